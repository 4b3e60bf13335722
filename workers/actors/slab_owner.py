"""The owner of one node-wide slab: hands out leases, and takes them back from ranks that died. No Ray.

The owner is a process of its own, so that it outlives the ranks it lends to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.storage.core.owners import Owner
from headrace.storage.core.records import Lease
from headrace.storage.tiers.host import HostSlab
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.ssd import SsdSlab
from headrace.workers.actors.janitor import watch_this_process

END_TIMEOUT_S = 30.0


class SlabOwner:
    """Shares one slab between the ranks of its node.

    Args:
        make: opens the slab; called by `open`, so that its errors reach whoever started this actor.
    """

    def __init__(self, make: Callable[[], Slab]) -> None:
        self._make = make
        self._opened: Slab | None = None
        self._janitor: subprocess.Popen[bytes] | None = None

    def open(self) -> str:
        """Reserve the memory or the disk; returns the file that ranks open.

        Raises:
            MachineError: there is too little of it.
        """
        if self._opened is None:
            self._opened = self._make()
            self._janitor = watch_this_process(Path(self._opened.path).parent)
        return self._opened.path

    def lend(self, holders: Sequence[tuple[str, Owner]]) -> dict[str, Lease]:
        """Equal parts of the slab.

        Args:
            holders: name and process on this node of all that share the slab.

        Returns:
            A lease for each holder, as many whole pages as the slab has for it; none where that is nothing.
        """
        part = self._slab.num_bytes // len(holders) // LEASE_ALIGNMENT * LEASE_ALIGNMENT
        if part == 0:
            return {}
        return {holder: self._slab.lease(holder, part, pid=process.pid) for holder, process in holders}

    def end(self, processes: Sequence[Owner], grace_s: float = 0.0) -> list[str]:
        """Kill processes of this node that may use the slab, wait until they are gone, and take back their leases.

        A stopped process does not hear a request to end, and a range must not be lent again while someone may write
        to it.

        Args:
            grace_s: for processes that have been asked to end and may do so in order.

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
        """Remove the slab; may be called twice."""
        if self._opened is not None:
            self._opened.close()
        if self._janitor is not None:
            self._janitor.kill()
            self._janitor.wait()

    @property
    def _slab(self) -> Slab:
        assert self._opened is not None, "the slab is not open"
        return self._opened


class HostMemory(SlabOwner):
    """Owns the node's host slab. As an actor: one per node, beside the ranks."""

    def __init__(self, num_bytes: int, run_id: str) -> None:
        super().__init__(lambda: HostSlab(num_bytes, run_id=run_id))


class SsdStorage(SlabOwner):
    """Owns the node's slab file on SSD. As an actor: one per node, beside the ranks."""

    def __init__(self, num_bytes: int, folder: str, run_id: str) -> None:
        super().__init__(lambda: SsdSlab(folder, num_bytes, run_id=run_id))


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
