"""Host memory as its owner has it: one shared slab per node. No torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.storage.core.errors import MachineError
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.tiers.memory_limits import MEMFD_NAME, SHM, UNBOUNDED, MemoryLimit, available_memory
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab

GIB = 1024**3


class HostSlab(Slab):
    """The node's host memory for offloaded blobs: a memfd, whatever the size of /dev/shm.

    The bytes are reserved here and allocated by the ranks, each on its own NUMA node (`touch.py`). Until then
    `available_memory` counts them as taken, so that no other slab of the node is given the same memory.

    Args:
        num_bytes: rounded up to whole pages; 0 makes an empty slab.
        run_id: goes into the name that /proc/PID/fd and /proc/PID/maps show.
        memory_grows: the machine gets memory as it uses it: what is free now does not limit the slab.

    Raises:
        MachineError: the machine, or a control group, has less memory than requested.
    """

    def __init__(self, num_bytes: int, *, run_id: str, memory_grows: bool = False) -> None:
        num_bytes = round_up(num_bytes, LEASE_ALIGNMENT)
        with _one_at_a_time():
            limit = available_memory(grows=memory_grows)
            if num_bytes > limit.available_bytes:
                raise MachineError(_message(num_bytes, limit))
            # The kernel cuts no name: it refuses one of more than 249 bytes.
            fd = os.memfd_create(f"{MEMFD_NAME}{run_id.encode()[:80].decode(errors='ignore')}", os.MFD_CLOEXEC)
            super().__init__(Medium.host, num_bytes, [fd])
            try:
                os.truncate(fd, num_bytes)
            except OSError as error:
                self.close()
                raise MachineError(
                    f"host tier: a memfd of {num_bytes} bytes cannot be made ({error.strerror}); lower "
                    "tiers.host.budget_gib, or raise the limit on file sizes (ulimit -f)"
                ) from error


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """No other process of the node looks for free memory meanwhile: two that look first would both reserve it."""
    if not SHM.is_dir():
        yield
        return
    fd = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _message(wanted: int, limit: MemoryLimit) -> str:
    there = "" if limit.available_bytes >= UNBOUNDED else f", {limit.available_bytes / GIB:.2f} GiB there"
    return (
        f"host tier: {wanted / GIB:.2f} GiB wanted{there} by {limit.source}; lower tiers.host.budget_gib "
        "(0 switches the tier off), give the container more memory, or close other programs. Where the machine's "
        "memory grows as it is used (some virtual machines): tiers.host.memory_grows=true"
    )
