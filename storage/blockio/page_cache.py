"""How much of a file the kernel keeps in memory: the proof that bytes went past the page cache, or did not.

cachestat(2), from Linux 6.5 on, walks the pages that are there; mincore(2) asks about each page of a mapping. Neither
brings a page in. Which one serves is tried once, on a file in memory of which one page is known to be there.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path

# One number on every architecture: system calls since 5.1 are numbered alike.
SYS_CACHESTAT = 451
# mincore answers with a byte per page of its window: 256 KiB.
WINDOW_BYTES = 1024**3

_LOWEST_BIT = bytes(value & 1 for value in range(256))


class _Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def resident_bytes(file: Path | str | int, offset_bytes: int, num_bytes: int) -> int:
    """Bytes of a file's range that are in the page cache, in whole pages; brings none of them in.

    With cachestat the cost grows with the pages that are there. With mincore it grows with the range: 0.1 s or so for
    16 GiB.

    Args:
        file: a path, or an open descriptor. It must be the caller's own or writable: of other files the kernel reports
            nothing.
        offset_bytes / num_bytes: the range; what lies past the end of the file is not resident.

    Raises:
        OSError: the file cannot be opened or asked about.
    """
    if isinstance(file, int):
        size = os.fstat(file).st_size
        end = min(offset_bytes + num_bytes, size)
        return counter()(file, offset_bytes, end) if end > offset_bytes else 0
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return resident_bytes(fd, offset_bytes, num_bytes)
    finally:
        os.close(fd)


@functools.cache
def counter() -> Callable[[int, int, int], int]:
    """The implementation that works here: (descriptor, begin, end) -> resident bytes.

    Raises:
        OSError: neither does.
    """
    fd = os.memfd_create("headrace-page-cache", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, 4 * mmap.PAGESIZE)
        os.pwrite(fd, b"x", 2 * mmap.PAGESIZE)
        for count in (by_cachestat, by_mincore):
            try:
                if count(fd, 0, 4 * mmap.PAGESIZE) == mmap.PAGESIZE:
                    return count
            except OSError:
                continue
    finally:
        os.close(fd)
    raise OSError(errno.ENOSYS, "neither cachestat nor mincore can report what is in the page cache")


def by_cachestat(fd: int, begin: int, end: int) -> int:
    """cachestat(2). Raises OSError, with ENOSYS where the kernel has no such call."""
    asked, answer = _Range(begin, end - begin), _CacheStat()
    failed = _libc().syscall(ctypes.c_long(SYS_CACHESTAT), fd, ctypes.byref(asked), ctypes.byref(answer), 0)
    _check(failed)
    return answer.cached * mmap.PAGESIZE


def by_mincore(fd: int, begin: int, end: int) -> int:
    """mincore(2) on a mapping whose pages are not read. Raises OSError."""
    first = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    skip = (begin - first) // mmap.PAGESIZE
    pages = 0
    for start in range(first, end, WINDOW_BYTES):
        seen = _pages(fd, start, min(WINDOW_BYTES, end - start))
        pages += seen[skip:].translate(_LOWEST_BIT).count(1)
        skip = 0
    return pages * mmap.PAGESIZE


def _pages(fd: int, offset: int, length: int) -> bytes:
    libc = _libc()
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    _check(-1 if address == ctypes.c_void_p(-1).value else 0)
    try:
        answer = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        _check(libc.mincore(address, length, answer))
        return answer.raw
    finally:
        libc.munmap(address, length)


def _check(answer: int) -> None:
    if answer != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc
