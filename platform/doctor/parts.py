"""Measurements in processes of their own: one that fails, hangs or breaks the CUDA context costs its own rows only.

The child prints one JSON object a line. What it printed before it died counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.core.outside import parse_json

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class PartResult:
    """What a part said.

    Args:
        rows: in the order they were printed.
        failure: why there are no more; None when the part came to its end.
    """

    rows: tuple[Row, ...]
    failure: str | None
    seconds: float

    def find(self, **wanted: object) -> Row | None:
        """The first row that has all the wanted values."""
        return find(self.rows, **wanted)


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The first row that has all the wanted values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def run_part(module: str, words: Sequence[str], *, limit_s: float) -> PartResult:
    """Run `python -m module words...` and collect its rows; on its limit it is killed with all of its children."""
    start = time.monotonic()
    # To a file and not a pipe: a full pipe, or a grandchild that holds it open, would keep us waiting.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=max(limit_s, 0.1))
            failure = None if code == 0 else _failure(code, _text(err))
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        return PartResult(tuple(_rows(_text(out))), failure, time.monotonic() - start)


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


def _rows(text: str) -> Iterable[Row]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                yield row


def _failure(code: int, errors: str) -> str:
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}: {last[:300]}"
    return last[:300]


def serve(parts: Mapping[str, Callable[..., Iterable[Row]]], argv: Sequence[str]) -> None:
    """The child's side: run the named part with the remaining words and print its rows as they come.

    The child offers itself to the kernel's out-of-memory killer before anything else on the machine.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for row in parts[argv[0]](*argv[1:]):
        print(json.dumps(row), flush=True)
