"""The owner's side of a node-wide tier: one byte range, lent out in leases. Leases move, bytes do not.

The files of a slab have no name (`storage/core/unnamed.py`): nothing is left of one when its owner and all who lease
from it have ended, and no clean-up is needed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from headrace.storage.core.ledger import PAGE_BYTES, Ledger
from headrace.storage.core.owners import Owner, owner_of
from headrace.storage.core.records import Lease, Medium
from headrace.storage.core.unnamed import path_of

# A rank maps its lease: it must start on a page, also where pages are larger than a block of a drive.
LEASE_ALIGNMENT = max(PAGE_BYTES, mmap.ALLOCATIONGRANULARITY)


class Slab:
    """A range of one or several files that ranks lease parts of. Not thread-safe: its actor serves one call at a time.

    Args:
        medium: host or ssd.
        num_bytes: size of the range.
        fds: the files, in stripe order; closed when the slab is closed or collected.
        direct / direct_why: whether lessees open the files with O_DIRECT, and how that was decided.
        folders / stripe_bytes: as Lease has them.
    """

    def __init__(
        self,
        medium: Medium,
        num_bytes: int,
        fds: Sequence[int],
        *,
        direct: bool = False,
        direct_why: str = "",
        folders: tuple[str, ...] = (),
        stripe_bytes: int = 0,
    ) -> None:
        self._clean_up = weakref.finalize(self, _close_all, tuple(fds))
        self.medium = medium
        self.num_bytes = num_bytes
        self.path, *more_paths = (path_of(fd) for fd in fds)
        self.more_paths = tuple(more_paths)
        self.direct = direct
        self.direct_why = direct_why
        self.folders = folders
        self.stripe_bytes = stripe_bytes
        key = f"tiers.{medium.value}.budget_gib"
        self._ledger = Ledger(medium.value, num_bytes, remedy=f"raise {key}", alignment=LEASE_ALIGNMENT)
        self._processes: dict[str, Owner] = {}
        self._next_id = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the range, in stripe order."""
        return (self.path, *self.more_paths)

    @property
    def free_bytes(self) -> int:
        """Bytes that are not leased."""
        return self._ledger.free_bytes

    @property
    def holders(self) -> list[str]:
        """Who holds a lease, oldest first."""
        return [str(holder) for holder in self._ledger]

    def lease(self, holder: str, num_bytes: int, *, pid: int | None = None, process: Owner | None = None) -> Lease:
        """Lend a range; leases of dead processes are taken back first.

        Args:
            holder: for example "rank3"; holds at most one lease.
            num_bytes: rounded up to whole pages.
            pid: the holder's process on this node, so that its death can be seen; None trusts `release` alone.
            process: the same, for who has known it for longer: another process under its id is not taken for it.

        Raises:
            TierFull: no range is large enough.
            RuntimeError: the holder has a lease already.
            ProcessLookupError: the process does not run.
        """
        if pid is not None:
            process = owner_of(pid)
        elif process is not None and not process.is_alive():
            raise ProcessLookupError(f"process {process.pid} of {holder} does not run")
        self.reclaim()
        if holder in self._ledger:
            raise RuntimeError(f"{self.medium.value} tier: {holder} has a lease already; release it first")
        slot = self._ledger.prepare(holder, num_bytes)
        if process is not None:
            self._processes[holder] = process
        self._next_id += 1
        return Lease(
            lease_id=self._next_id,
            holder=holder,
            medium=self.medium,
            path=self.path,
            offset_bytes=slot.offset_bytes,
            num_bytes=slot.num_bytes,
            direct=self.direct,
            more_paths=self.more_paths,
            stripe_bytes=self.stripe_bytes,
            direct_why=self.direct_why,
            folders=self.folders,
        )

    def release(self, holder: str) -> bool:
        """Take the holder's range back; False where it holds none. The holder must have stopped using it."""
        self._processes.pop(holder, None)
        if holder not in self._ledger:
            return False
        self._ledger.free(holder)
        return True

    def reclaim(self) -> list[str]:
        """Take back the leases of processes that are dead; returns their holders."""
        dead = [holder for holder, process in self._processes.items() if not process.is_alive()]
        for holder in dead:
            self.release(holder)
        return dead

    def record(self) -> dict[str, Any]:
        """What the run's record should know about the slab, JSON-able."""
        return {"paths": list(self.paths), "folders": list(self.folders), "num_bytes": self.num_bytes}

    def close(self) -> None:
        """Let go of the files; may be called twice. Ranks that still use them keep their bytes until they close."""
        self._clean_up()

    def __enter__(self) -> Self:
        """The slab itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):  # of a mount that is gone; the descriptor is free all the same
            os.close(fd)
