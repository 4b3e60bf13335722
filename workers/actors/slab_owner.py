"""The owner of one node-wide slab: hands out leases, and takes them back from ranks that have ended. No Ray.

The owner is a separate process, so that it runs longer than the ranks that have leases.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from headrace.storage.config import DirectMode
from headrace.storage.core.cleanup import after_error
from headrace.storage.core.owners import Owner
from headrace.storage.core.records import Lease
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.workers.actors.status import Holder

END_TIMEOUT_S = 30.0


class SlabOwner:
    """Shares one slab between the ranks of its node.

    Args:
        make: opens the slab; called by `open`, so that its errors reach the process that started this actor.
    """

    def __init__(self, make: Callable[[], Slab]) -> None:
        self._make = make
        self._opened: Slab | None = None

    def open(self) -> str:
        """Reserve the memory or the disk; returns the file that ranks open.

        Raises:
            MachineError: there is too little of it.
        """
        if self._opened is None:
            self._opened = self._make()
        return self._opened.path

    def lend(self, holders: Sequence[Holder]) -> dict[str, Lease]:
        """Equal parts of the slab, in the order of the holders.

        Args:
            holders: all that share the slab.

        Returns:
            A lease for each holder, as many whole pages as the slab has for it; none where that is nothing, and none
            for a holder that has ended by now: the call that starts it reports that.

        Raises:
            TierFull: leases of others are in the way. RuntimeError: a holder has a lease. Nothing was lent.
        """
        part = self._slab.num_bytes // len(holders) // LEASE_ALIGNMENT * LEASE_ALIGNMENT
        lent: dict[str, Lease] = {}
        try:
            for name, process in holders if part else ():
                with contextlib.suppress(ProcessLookupError):
                    lent[name] = self._slab.lease(name, part, process=process)
        except BaseException as error:
            after_error(error, *(functools.partial(self._slab.release, name) for name in lent))
            raise
        return lent

    def record(self) -> dict[str, Any]:
        """What the run's record should know about the slab, JSON-able."""
        return {"medium": self._slab.medium.value, "pid": os.getpid()} | self._slab.record()

    def end(self, processes: Sequence[Owner], grace_s: float = 0.0) -> list[str]:
        """Kill processes of this node that may use the slab, wait until they are gone, and take back their leases.

        A stopped process does not hear a request to end, and a range must not be lent again while someone may write
        to it.

        Args:
            grace_s: time in which the processes may end in order.

        Returns:
            Holders whose leases were taken back.

        Raises:
            TimeoutError: a process did not go: it sits in the kernel.
        """
        wait_for(processes, grace_s)
        end_processes(processes)
        return self._slab.reclaim()

    def holders(self) -> list[str]:
        """Who holds a lease."""
        return self._slab.holders

    def close(self) -> None:
        """Let go of the slab; may be called twice."""
        if self._opened is not None:
            self._opened.close()

    @property
    def _slab(self) -> Slab:
        assert self._opened is not None, "the slab is not open"
        return self._opened


class HostMemory(SlabOwner):
    """Owns the node's host slab. As an actor: one per node, beside the ranks."""

    def __init__(self, num_bytes: int, run_id: str, memory_grows: bool = False) -> None:
        super().__init__(lambda: HostSlab(num_bytes, run_id=run_id, memory_grows=memory_grows))


class SsdStorage(SlabOwner):
    """Owns the node's slab files, one on each drive. As an actor: one per node, beside the ranks."""

    def __init__(self, num_bytes: int, folders: Sequence[str], direct: DirectMode = DirectMode.auto) -> None:
        super().__init__(functools.partial(SsdSlab, folders, num_bytes, direct=direct))


def end_processes(processes: Sequence[Owner]) -> None:
    """SIGKILL processes of this node and wait until none runs. Raises TimeoutError where one sits in the kernel."""
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
    left = wait_for(processes, END_TIMEOUT_S)
    if left:
        pids = [process.pid for process in left]
        raise TimeoutError(f"process(es) {pids} were killed {END_TIMEOUT_S:g} s ago and are still there")


def wait_for(processes: Sequence[Owner], timeout_s: float) -> list[Owner]:
    """Wait for processes of this node to end; those that still run when the time is up."""
    until_s = time.monotonic() + timeout_s
    while (left := [process for process in processes if process.is_alive()]) and time.monotonic() < until_s:
        time.sleep(0.02)
    return left
