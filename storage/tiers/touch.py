"""A slab's pages made present before the first step: each part on its node, by all cores. No torch."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from headrace.storage.tiers.huge_pages import advise_huge, huge_bytes_in, populate
from headrace.storage.tiers.numa import Region, prefer_node

PIECE_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Touched:
    """How the pages came.

    Args:
        how: the system call that made them present.
        huge_bytes: of them in huge pages.
        refused: why the kernel did not take the wish for nodes; empty where it did, or none was made.
    """

    how: str
    num_threads: int
    wall_s: float
    huge_bytes: int
    refused: str


def touch(
    fd: int, num_bytes: int, regions: Sequence[Region], *, huge: bool, after_piece: Callable[[], None] | None = None
) -> Touched:
    """Make every page of a file in memory present.

    The wish for a node stands before the first page is taken, and holds for the file, so that pages which are swapped
    out come back there. Threads run on cores of the node that they touch, where it has any.

    Args:
        num_bytes: size of the file.
        regions: that cover the file; none: nothing is bound.
        huge: ask for huge pages.
        after_piece: called by the threads, from time to time.

    Raises:
        OSError: the file system or the machine has no page left.
    """
    begin_s = time.perf_counter()
    if num_bytes == 0:
        return Touched("nothing to touch", 0, 0.0, 0, "")
    with mmap.mmap(fd, num_bytes) as memory, _address(memory) as address:
        refused = _bind(address, regions)
        if huge:
            advise_huge(address, num_bytes)
        try:
            threads = _on_all_cores(num_bytes, regions, _piecewise(populate, address, after_piece))
            how = "madvise(MADV_POPULATE_WRITE)"
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Reserved first, so that a lack is an error here and not a SIGBUS in a thread.
            os.posix_fallocate(fd, 0, num_bytes)
            threads = _on_all_cores(num_bytes, regions, _piecewise(_write, address, after_piece))
            how = "posix_fallocate and a byte of each page: the kernel is older than Linux 5.14"
        got = huge_bytes_in(address, num_bytes) if huge else 0
    return Touched(how, threads, time.perf_counter() - begin_s, got, refused)


def _bind(address: int, regions: Sequence[Region]) -> str:
    """Why the kernel refused; empty where it did not."""
    try:
        for region in regions:
            prefer_node(address + region.begin, region.end - region.begin, region.node.node)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _on_all_cores(num_bytes: int, regions: Sequence[Region], work: Callable[[int, int], None]) -> int:
    """Do the work on all pieces, of all regions at once; returns the number of threads."""
    everywhere = frozenset(os.sched_getaffinity(0))
    parts = [(region.begin, region.end, region.node.cores) for region in regions] or [(0, num_bytes, everywhere)]
    num_threads = 0
    with ExitStack() as closing:
        done = []
        for begin, end, cores in parts:
            # A node without cores for us: any may touch, the wish for the node stands.
            own = cores or everywhere
            pool = ThreadPoolExecutor(len(own), initializer=_pin, initargs=(own,))
            closing.callback(pool.shutdown, cancel_futures=True)
            num_threads += len(own)
            done.append(pool.map(work, *zip(*_pieces(begin, end), strict=True)))
        for results in done:
            list(results)
    return num_threads


def _pin(cores: frozenset[int]) -> None:
    # Without it the wish for a node stands all the same, and where pages are is asked afterwards, not assumed.
    with suppress(OSError):
        os.sched_setaffinity(0, cores)


def _piecewise(
    work: Callable[[int, int], None], address: int, after_piece: Callable[[], None] | None
) -> Callable[[int, int], None]:
    def one(begin: int, num_bytes: int) -> None:
        work(address + begin, num_bytes)
        if after_piece is not None:
            after_piece()

    return one


def _pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for piece in range(begin, end, PIECE_BYTES):
        yield piece, min(PIECE_BYTES, end - piece)


def _write(address: int, num_bytes: int) -> None:
    pages = np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))
    pages[:: mmap.PAGESIZE] = 0


@contextmanager
def _address(memory: mmap.mmap) -> Iterator[int]:
    """Where a writable mapping starts. It cannot be closed while the context lasts."""
    start = ctypes.c_char.from_buffer(memory)
    try:
        yield ctypes.addressof(start)
    finally:
        del start
