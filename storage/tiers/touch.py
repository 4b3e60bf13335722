"""A lease of host memory allocated before the first step, by its rank, on the rank's own NUMA node. No torch.

The kernel takes a page from the node of the core that touches it first. So the threads that touch run on the cores near
the rank's device.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.storage.tiers.huge_pages import ON, advise_huge, huge_bytes_in, memfd_setting, populate

PIECE_BYTES = 64 * 1024**2
SYS = Path("/sys")


@dataclass(frozen=True)
class Touched:
    """How the pages came.

    Args:
        how: the system call that allocated them.
        huge_bytes: of them in huge pages.
    """

    how: str
    num_threads: int
    wall_s: float
    huge_bytes: int


def touch(fd: int, offset_bytes: int, address: int, num_bytes: int, cores: frozenset[int] | None = None) -> Touched:
    """Allocate every page of a mapped range of a file in memory. Bytes that are there already stay.

    Args:
        fd / offset_bytes: the file, and where the range starts in it.
        address / num_bytes: of the mapping, which is writable.
        cores: that the threads run on; None: all that this process may use.

    Raises:
        OSError: ENOSPC where the machine has no page left.
    """
    begin_s = time.perf_counter()
    huge = memfd_setting() in ON
    if huge:
        advise_huge(address, num_bytes)
    num_threads = len(cores or os.sched_getaffinity(0))
    with ThreadPoolExecutor(num_threads, initializer=_pin, initargs=(cores,)) as pool:
        try:
            _in_pieces(pool, populate, address, num_bytes)
            how = "madvise(MADV_POPULATE_WRITE)"
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Reserved first, so that a lack is an error here and not a SIGBUS in a thread.
            pool.submit(os.posix_fallocate, fd, offset_bytes, num_bytes).result()
            _in_pieces(pool, _write, address, num_bytes)
            how = "posix_fallocate and a byte of each page: the kernel is older than Linux 5.14"
    return Touched(how, num_threads, time.perf_counter() - begin_s, huge_bytes_in(address, num_bytes) if huge else 0)


def cores_near(pci_address: str, *, sys: Path = SYS) -> frozenset[int] | None:
    """Cores on the NUMA node of a PCI device that this process may use; None if there are none, or if it is unknown.

    Args:
        pci_address: such as "0000:3b:00.0".
    """
    try:
        text = (sys / "bus/pci/devices" / pci_address.lower() / "local_cpulist").read_text()
    except OSError:
        return None
    return frozenset(parse_list(text) & os.sched_getaffinity(0)) or None


def parse_list(text: str) -> set[int]:
    """The numbers of a kernel list such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found


def _pin(cores: frozenset[int] | None) -> None:
    if cores is not None:
        with suppress(OSError):  # the pages then come from the node of whatever core the thread is on
            os.sched_setaffinity(0, cores)


def _in_pieces(pool: ThreadPoolExecutor, work: Callable[[int, int], None], address: int, num_bytes: int) -> None:
    begins = range(0, num_bytes, PIECE_BYTES)
    list(pool.map(lambda begin: work(address + begin, min(PIECE_BYTES, num_bytes - begin)), begins))


def _write(address: int, num_bytes: int) -> None:
    pages = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    pages[:: mmap.PAGESIZE] |= 0  # a write that changes nothing: a rank before this one may have left blobs
