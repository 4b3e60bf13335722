"""The parent's side of `headrace bench kernels`: child processes by family, and cases of a group in turns.

All cases of a group are made ready one after the other, since they share the device; then every one runs once per
round, round by round, and who begins moves on by one: a device that slows down slows all of them. A child that dies or
takes too long costs its case; the others of its family are made ready again in a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.platform.bench.harness import Row
from headrace.platform.bench.kernel_case import Case, compact

CHILD = "headrace.platform.bench.kernel_child"
MEMORY_ON_CPU = "not measured: the CPU allocator counts nothing"
TOO_LATE = "not started: the time of the whole benchmark (limit_s) is used up"
Numbers = dict[str, float | int | None]


class ChildLost(Exception):
    """The child process died or took too long; the text says which."""


class Child:
    """One process of kernel_child. Closing it ends the process, in the middle of a case too."""

    def __init__(self, environment: Mapping[str, str], command: Sequence[str] | None = None) -> None:
        """Start it; it imports while the caller goes on.

        Args:
            environment: added to our own.
            command: instead of kernel_child; the file descriptor is appended.
        """
        receive, send = os.pipe()
        words = [*(command or (sys.executable, "-m", CHILD)), str(send)]
        self._answers = os.fdopen(receive, "rb", buffering=0)
        self._rest = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(send,),
                env={**os.environ, **environment},
            )
        finally:
            os.close(send)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            ChildLost: it ended, or did not answer in time; it is closed then.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(compact(request).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._line(time.monotonic() + limit_s, limit_s))
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            said = self._last_error_line()
            self.close()
            raise ChildLost(f"its process ended with code {code}" + (f": {said}" if said else "")) from None
        except TimeoutError as error:
            self.close()
            raise ChildLost(str(error)) from None

    def _line(self, until_s: float, limit_s: float) -> bytes:
        while b"\n" not in self._rest:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._answers], [], [], left_s)[0]:
                raise TimeoutError(f"stopped after {limit_s:g} s (case_limit_s)")
            found = self._answers.read(65536)
            if not found:
                raise EOFError
            self._rest += found
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_error_line(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4000))
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:400] if lines else ""

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._answers.close()
        self._errors.close()


@dataclass
class Found:
    """What is known of a case: from making it ready, and from every round."""

    numbers: Numbers = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Numbers] = field(default_factory=list)
    error: str | None = None


class Workshop:
    """The children of a run, one per family, and what is ready in them."""

    def __init__(self, case_limit_s: float, start: Callable[[Mapping[str, str]], Child] = Child) -> None:
        self._case_limit_s = case_limit_s
        self._start = start
        self._children: dict[str, Child] = {}
        self._ready: dict[str, set[str]] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children.values():
            child.close()

    def start(self, cases: Sequence[Case]) -> None:
        """Start the children that these cases need; they import at the same time."""
        for case in cases:
            if case.family not in self._children:
                self._children[case.family] = self._start(case.environment)
                self._ready[case.family] = set()

    def measure(self, cases: Sequence[Case], rounds: int) -> dict[str, Found]:
        """Run the cases of one group in turns.

        Returns:
            By the case's name, in the order given.
        """
        self.start(cases)
        found = {case.name: Found() for case in cases}
        for case in cases:
            self._prepare(case, found[case.name])
        for number in range(rounds):
            first = number % len(cases)
            for case in [*cases[first:], *cases[:first]]:
                self._round(case, found[case.name])
        for family in {case.family for case in cases} & set(self._children):
            self._ask(family, {"do": "drop"})
            self._ready[family] = set()
        return found

    def _prepare(self, case: Case, found: Found) -> None:
        answer = self._ask(case.family, {"do": "prepare", "case": case.to_json()}, case)
        found.error = answer.get("error")
        if found.error is None:
            found.numbers, found.facts = answer["numbers"], answer["facts"]
            self._ready[case.family].add(case.name)

    def _round(self, case: Case, found: Found) -> None:
        if found.error is None and case.name not in self._ready.get(case.family, set()):
            self._prepare(case, found)  # another case of the family took the process with it
        if found.error is not None:
            return
        answer = self._ask(case.family, {"do": "round", "name": case.name}, case)
        found.error = answer.get("error")
        if found.error is None:
            found.rounds.append(answer["numbers"])

    def _ask(self, family: str, request: Mapping[str, Any], case: Case | None = None) -> dict[str, Any]:
        if family not in self._children:
            assert case is not None
            self.start([case])
        try:
            answer = self._children[family].ask(request, self._case_limit_s)
        except ChildLost as error:
            self._forget(family)
            return {"error": str(error)}
        if answer.get("lost"):
            self._children[family].close()
            self._forget(family)
        return answer

    def _forget(self, family: str) -> None:
        del self._children[family]
        self._ready[family] = set()


def row_of(case: Case, found: Found) -> Row:
    """The row of a case: medians over the rounds, and every round's total in the config."""
    config: dict[str, Any] = {
        **{key: value for key, value in case.to_json().items() if value not in ({}, None)},
        **found.facts,
    }
    if case.device == "cpu":
        config["memory"] = MEMORY_ON_CPU
    if found.error is not None:
        return Row(case.name, config=config, error=found.error)
    numbers: Numbers = dict(found.numbers)
    for key in found.rounds[0] if found.rounds else ():
        values = [one[key] for one in found.rounds]
        known = [value for value in values if value is not None]
        numbers[key] = statistics.median(known) if known else None
    totals = [float(one["total_ms"] or 0.0) for one in found.rounds]
    numbers |= {"total_ms_min": min(totals), "total_ms_max": max(totals), "rounds": len(totals)}
    config["total_ms_each"] = [round(total, 4) for total in totals]
    return Row(case.name, numbers, config)


def in_groups(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """The cases by group, in order."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    yield from groups.values()
