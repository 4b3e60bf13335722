"""The parent's side of `headrace bench kernels`: child processes by family, and cases of a group in turns.

All cases of a group are made ready one after the other, since they share the device; then every one runs once per
round, round by round, and who begins moves on by one: a device that slows down slows all of them. A child that ends or
takes too long costs its case; the others of its family are made ready again in a new one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.harness import Row
from headrace.bench.kernel_case import Case
from headrace.platform.children import Child

CHILD = [sys.executable, "-m", "headrace.bench.kernel_child"]
MEMORY_ON_CPU = "not measured: the CPU allocator has no counters"
TOO_LATE = "not started: the time limit of the whole benchmark (limit_s) has passed"
Numbers = dict[str, float | int | None]


@dataclass
class Found:
    """What is known of a case: from making it ready, and from every round."""

    numbers: Numbers = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[Numbers] = field(default_factory=list)
    error: str | None = None


class Workshop:
    """The children of a run, one per family, and what is ready in them."""

    def __init__(self, case_limit_s: float, command: Sequence[str] = CHILD) -> None:
        self._case_limit_s = case_limit_s
        self._command = command
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
                self._children[case.family] = Child(
                    self._command, limit_s=self._case_limit_s, environment=case.environment
                )
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
        child = self._children[family]
        answer = child.ask(request, self._case_limit_s)
        if answer is None or answer.get("lost"):
            child.close()
            del self._children[family]
            self._ready[family] = set()
        return {"error": child.failure or "its process ended"} if answer is None else answer


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
