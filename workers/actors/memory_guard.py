"""Ends a rank with a named cause before the kernel kills it because host memory ran out. No torch, no Ray."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from headrace.storage.core.errors import ErrorId, HeadraceError
from headrace.storage.tiers.memory_limits import MemoryLimit
from headrace.workers.actors.status import RankFailure

MIB = 1024**2
# The kernel begins to kill when nothing is left. One thread fills some 1 GiB/s, so between two looks 100 MiB can go.
SAVE_BELOW_BYTES = 512 * MIB
END_BELOW_BYTES = 192 * MIB
LOOK_S = 0.1
REMEDIES = (
    "Lower tiers.host.budget_gib (without a GPU also tiers.device.budget_gib or data.seq_len), start fewer ranks on "
    "this node, give the container more memory, or close other programs"
)


class MemoryGuard:
    """Looks at the host memory that is left, from a thread of its own while it is entered.

    Below SAVE_BELOW_BYTES `is_low` is set: the rank is to save and stop. Below END_BELOW_BYTES there is no time for
    that: the cause is written to a file and the process ends, which gives its memory back at once.

    Args:
        look: says how much is left, and by which limit.
        path: of the file for the cause.
        end: ends the process.
    """

    def __init__(
        self, look: Callable[[], MemoryLimit], path: Path, *, end: Callable[[int], NoReturn] = os._exit
    ) -> None:
        self._look, self._path, self._end = look, path, end
        self._least: MemoryLimit | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory guard", daemon=True)

    @property
    def is_low(self) -> bool:
        """Whether the rank is to save and stop."""
        return self._least is not None

    def look(self) -> None:
        """Look once, and act."""
        limit = self._look()
        if limit.available_bytes >= SAVE_BELOW_BYTES:
            return
        self._least = limit
        if limit.available_bytes < END_BELOW_BYTES:
            text = str(_error(limit, "The rank ended at once, without a checkpoint"))
            with suppress(OSError):
                self._path.write_text(text)
            print(text, file=sys.stderr, flush=True)
            self._end(1)

    def saved(self, step: int) -> HeadraceError:
        """The error of a rank that has saved and stopped because memory was low; host_memory_low."""
        assert self._least is not None
        return _error(self._least, f"The run saved step {step} and stopped")

    def __enter__(self) -> Self:
        """The guard at work."""
        self._path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_S):
            with suppress(OSError):  # a file of /proc that was not there at the moment
                self.look()


def _error(limit: MemoryLimit, what: str) -> HeadraceError:
    left = f"{limit.available_bytes / MIB:.0f} MiB left by {limit.source}"
    text = f"host memory is nearly used up: {left}. {what} before the kernel would kill it. {REMEDIES}"
    return HeadraceError(text, id=ErrorId.host_memory_low)


def cause_path(run_dir: str | Path, rank: int, attempt: int) -> Path:
    """Where a rank of a group leaves the cause when it ends at once."""
    return Path(run_dir) / "ranks" / f"rank{rank}" / f"host-memory-attempt{attempt}.txt"


def cause_of_death(path: Path) -> RankFailure | None:
    """What ended a rank that is gone; None where the guard did not."""
    try:
        return RankFailure.of(HeadraceError(path.read_text(), id=ErrorId.host_memory_low), "")
    except OSError:
        return None


def num_oom_kills(proc: Path = Path("/proc")) -> int:
    """How many processes the kernel has killed because memory ran out, since it started; 0 if unknown."""
    try:
        lines = (proc / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
