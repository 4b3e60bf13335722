"""The owner of one node-wide slab: hands out leases, and takes them back from ranks that died. No Ray.

The owner is a process of its own, so that it outlives the ranks it lends to.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headrace.storage.config import DirectMode
from headrace.storage.core.errors import TierFull
from headrace.storage.core.owners import Owner
from headrace.storage.core.records import Lease
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.memory_limits import SHM
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.workers.actors.janitor import watch_this_process
from headrace.workers.actors.status import Holder

END_TIMEOUT_S = 30.0


class SlabOwner:
    """Shares one slab between the ranks of its node.

    Args:
        make: opens the slab; called by `open`, so that its errors reach whoever started this actor.
        folders: where it may put files.
    """

    def __init__(self, make: Callable[[], Slab], folders: Sequence[Path]) -> None:
        self._make, self._folders = make, folders
        self._opened: Slab | None = None
        self._janitor: subprocess.Popen[bytes] | None = None

    def open(self) -> str:
        """Reserve the memory or the disk; returns the file that ranks open.

        Raises:
            MachineError: there is too little of it.
        """
        if self._opened is None:
            # Before the slab is there: making a large one takes minutes, in which its owner may be killed.
            self._janitor = watch_this_process(self._folders)
            try:
                self._opened = self._make()
            except BaseException:
                self._end_janitor()
                raise
        return self._opened.path

    def lend(self, holders: Sequence[Holder]) -> dict[str, Lease]:
        """Equal parts of the slab, each on its holder's NUMA node as far as all parts find room.

        Args:
            holders: all that share the slab.

        Returns:
            A lease for each holder, as many whole pages as the slab has for it; none where that is nothing, and none
            for a holder that has died by now: whoever tells it to start finds out.

        Raises:
            TierFull: leases of others are in the way. RuntimeError: a holder has a lease. Nothing was lent.
        """
        part = self._slab.num_bytes // len(holders) // LEASE_ALIGNMENT * LEASE_ALIGNMENT
        if part == 0:
            return {}
        try:
            return self._lend_parts(holders, part)
        except TierFull:
            # Each on its own node left holes too small for a part. In the order of their nodes they leave none.
            packed = sorted(holders, key=lambda holder: (holder[2] is None, holder[2] or 0))
            return self._lend_parts([(name, process, None) for name, process, _ in packed], part)

    def record(self) -> dict[str, Any]:
        """What the run's record should know about the slab, JSON-able."""
        return {"medium": self._slab.medium.value} | self._slab.record()

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
        self._end_janitor()

    def _lend_parts(self, holders: Sequence[Holder], part: int) -> dict[str, Lease]:
        """All leases or, with an error, none."""
        lent: dict[str, Lease] = {}
        try:
            for name, process, node in holders:
                with contextlib.suppress(ProcessLookupError):
                    lent[name] = self._slab.lease(name, part, process=process, numa_node=node)
        except BaseException:
            for name in lent:
                self._slab.release(name)
            raise
        return lent

    def _end_janitor(self) -> None:
        janitor, self._janitor = self._janitor, None
        if janitor is not None:
            janitor.kill()
            janitor.wait()

    @property
    def _slab(self) -> Slab:
        assert self._opened is not None, "the slab is not open"
        return self._opened


class HostMemory(SlabOwner):
    """Owns the node's host slab. As an actor: one per node, beside the ranks."""

    def __init__(self, num_bytes: int, run_id: str, memory_grows: bool = False) -> None:
        super().__init__(lambda: HostSlab(num_bytes, run_id=run_id, memory_grows=memory_grows), [SHM])


class SsdStorage(SlabOwner):
    """Owns the node's slab files, one on each drive. As an actor: one per node, beside the ranks."""

    def __init__(
        self, num_bytes: int, folders: Sequence[str], run_id: str, direct: DirectMode = DirectMode.auto
    ) -> None:
        make = functools.partial(SsdSlab, folders, num_bytes, run_id=run_id, direct=direct)
        super().__init__(make, [Path(folder) for folder in folders])


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
