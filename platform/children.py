"""Work in processes of its own: one that fails, hangs or breaks the CUDA context costs its own rows only.

A child prints one JSON object a line, and any other text. What it printed before it ended counts. It has a
process group of its own, which is killed as a whole, and is killed itself when the thread that started it ends.
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headrace.storage.core.owners import die_with_parent

Row = dict[str, Any]
POLL_S = 0.005


class Child:
    """A running process and the rows that it prints."""

    failure: str | None = None
    """Why there are no more rows; None while it runs, and where it ended with exit code 0."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        limit_s: float,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            limit_s: seconds after which it is killed with all of its children.
            environment: added to our own.
            log: file of all that it prints; None keeps that in files without a name until it is closed.
        """
        self.begin_s = time.monotonic()
        self._allow(limit_s)
        # To files and not to pipes: a full pipe, or a grandchild that holds it open, would keep us waiting.
        self._out: IO[bytes] = tempfile.TemporaryFile() if log is None else log.open("w+b")  # noqa: SIM115
        self._errors: IO[bytes] = tempfile.TemporaryFile() if log is None else self._out  # noqa: SIM115
        self._place, self._rest, self._lines = 0, b"", deque[bytes]()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._out,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            preexec_fn=_die_with(os.getpid()),
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Row | None:
        """Send a request, one line of JSON on its standard input, and wait for its next row; None as in `row`."""
        self._allow(limit_s)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `row` tells how it ended
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return self.row()

    def rows(self) -> Iterator[Row]:
        """The rows as they come, until the child ends or its limit is over. It gets no request."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        yield from iter(self.row, None)

    def row(self) -> Row | None:
        """The next row; None once the child has ended or its limit is over, and it is closed then."""
        while not self._out.closed:
            over = self._process.poll() is not None  # asked first: what it printed before its end is in the file
            self._read(last=over)
            while self._lines:
                line = self._lines.popleft()
                if line.startswith(b"{"):
                    with contextlib.suppress(ValueError):
                        return json.loads(line)
            if over or time.monotonic() > self._end_s:
                if not over:
                    self.failure = f"stopped after {self._limit_s:g} s"
                elif self._process.returncode:
                    self.failure = self._why()
                self.close()
                return None
            time.sleep(POLL_S)
        return None

    def close(self) -> None:
        """Kill its process group and close its files."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._out.close()
        self._errors.close()

    def _allow(self, limit_s: float) -> None:
        self._limit_s, self._end_s = limit_s, time.monotonic() + limit_s

    def _read(self, *, last: bool) -> None:
        """Take in the whole lines that were printed since; with `last` also one without its end."""
        found = os.pread(self._out.fileno(), os.fstat(self._out.fileno()).st_size - self._place, self._place)
        self._place += len(found)
        *lines, self._rest = (self._rest + found).split(b"\n")
        self._lines.extend(lines)
        if last:
            self._lines.append(self._rest)
            self._rest = b""

    def _why(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        text = os.pread(self._errors.fileno(), 4000, max(0, size - 4000)).decode(errors="replace")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")[:400]
        code = self._process.returncode
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}: {last}"
        return f"exit code {code}: {last}"


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does between fork and exec, so that it never outlives its parent, not even one that is killed."""

    def ask_the_kernel() -> None:
        die_with_parent()
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_the_kernel


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
    with Child([sys.executable, "-m", module, *words], limit_s=limit_s) as child:
        rows = tuple(child.rows())
    return PartResult(rows, child.failure, time.monotonic() - child.begin_s)


def serve(parts: Mapping[str, Callable[..., Iterable[Row]]], argv: Sequence[str]) -> None:
    """The child's side: run the named part with the remaining words and print its rows as they come.

    The child offers itself to the kernel's out-of-memory killer before anything else on the machine.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    for row in parts[argv[0]](*argv[1:]):
        tell(row)


def tell(row: Mapping[str, Any]) -> None:
    """The child's side: print one row, on a line of its own also where a library has not ended its line."""
    print("\n" + json.dumps(row), flush=True)
