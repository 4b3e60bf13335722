"""Memory and drive of the host, without torch: they are known also where torch is broken.

Rates are GB/s (1e9 bytes); sizes are GiB (2**30).
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headrace.platform.children import Row
from headrace.platform.doctor.check import GIB
from headrace.storage.blockio.direct_file import probe_direct
from headrace.storage.core.anonymous import anonymous_memory
from headrace.storage.tiers.memory_limits import available_memory

NUM_THREADS = 4


def memory_info() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2}


def host_memory() -> list[Row]:
    """What /proc/meminfo and the control groups say now. A machine may grow: see `mem_total_gib_after` of pin_times."""
    info, limit = memory_info(), available_memory()
    shm = os.statvfs("/dev/shm")
    return [
        {
            "what": "host_memory",
            "mem_total_gib": info["MemTotal"] / GIB,
            "mem_available_gib": info["MemAvailable"] / GIB,
            "available_gib": limit.available_bytes / GIB,
            "bound_by": limit.source,
            "dev_shm_gib": shm.f_frsize * shm.f_blocks / GIB,
            "num_cores": len(os.sched_getaffinity(0)),
        }
    ]


def disk_rates(
    folder: str | None = None, num_bytes: int = 8 * GIB, block_bytes: int = 8 * 2**20, *, num_tries: int = 1
) -> list[Row]:
    """O_DIRECT write and read of one file by four threads, the best of the tries; a kill leaves no file.

    A file system without O_DIRECT gives a row with `direct: false` and the rate through the page cache.

    Raises:
        OSError: the folder cannot be written, or has no room for two blocks.
    """
    folder = folder or tempfile.gettempdir()
    stat = os.statvfs(folder)
    free = stat.f_frsize * stat.f_bavail
    num_bytes = min(num_bytes, free // 2) // block_bytes * block_bytes
    if num_bytes == 0:
        raise OSError(errno.ENOSPC, f"{free} bytes free, {2 * block_bytes} are wanted to measure", folder)
    probe = probe_direct(Path(folder))
    row: Row = {"what": "disk", "folder_free_gib": free / GIB, "bytes": num_bytes, "block_bytes": block_bytes}
    row |= {"direct": probe.direct, "direct_why": probe.why}
    path = Path(folder) / f".headrace-disk-{os.getpid()}.bin"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if probe.direct else 0), 0o600)
    path.unlink()
    try:
        os.posix_fallocate(handle, 0, num_bytes)
        row["write_gbps"] = max(_drive(handle, num_bytes, block_bytes, write=True) for _ in range(num_tries))
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        row["read_gbps"] = max(_drive(handle, num_bytes, block_bytes, write=False) for _ in range(num_tries))
    finally:
        os.close(handle)
    return [row]


def _drive(handle: int, num_bytes: int, block_bytes: int, *, write: bool) -> float:
    """GB/s of moving the whole file once, blocks dealt to threads in turn."""
    num_blocks = num_bytes // block_bytes
    # As a staging ring has them, and random: a drive that compresses must not shine.
    blocks = [anonymous_memory(block_bytes) for _ in range(NUM_THREADS)]
    random = os.urandom(block_bytes)
    for block in blocks:
        block[:] = random

    def worker(first: int) -> None:
        for index in range(first, num_blocks, NUM_THREADS):
            offset = index * block_bytes
            moved = os.pwrite(handle, blocks[first], offset) if write else os.preadv(handle, [blocks[first]], offset)
            if moved != block_bytes:
                raise OSError(errno.EIO, f"moved {moved} of {block_bytes} bytes at offset {offset}")

    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(worker, range(NUM_THREADS)))
    if write:
        os.fsync(handle)
    return num_blocks * block_bytes / (time.perf_counter() - start) / 1e9
