"""Rates of the machine that every later target is relative to: copies, pinning, GEMM, drive.

Each function measures one thing and returns plain JSON-able rows. Rates are GB/s (1e9 bytes) and TFLOP/s (1e12);
sizes are GiB (2**30). Times come from CUDA events where the work is on the device and from the wall clock elsewhere.
"""

from __future__ import annotations

import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
GIB = 2**30


def cuda_seconds(work: Callable[[], Any], *, min_s: float = 0.3, max_calls: int = 200) -> float:
    """Median seconds of one call of `work` on the device, after two warm-up calls.

    Calls until `min_s` of device time has been measured, at least three times (once where one call takes over 2 s).
    """
    work()
    first = _one_call(work)
    if first > 2.0:
        return first
    samples = [first]
    while (len(samples) < 3 or sum(samples) < min_s) and len(samples) < max_calls:
        samples.append(_one_call(work))
    return sorted(samples)[len(samples) // 2]


def _one_call(work: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@contextmanager
def pinned_buffer(num_bytes: int) -> Iterator[tuple[torch.Tensor, float, float]]:
    """A page-aligned host buffer registered with CUDA, exact to the byte (no power-of-two rounding).

    Yields:
        (uint8 tensor (num_bytes,), seconds to touch every page with all cores, seconds of cudaHostRegister).

    Raises:
        RuntimeError: cudaHostRegister refused; the message carries its code.
    """
    region = mmap.mmap(-1, num_bytes)
    tensor = torch.frombuffer(region, dtype=torch.uint8)
    touch_s = touch(tensor)
    start = time.perf_counter()
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
    pin_s = time.perf_counter() - start
    if code != 0:
        raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed with code {code}")
    try:
        yield tensor, touch_s, pin_s
    finally:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        del tensor
        region.close()


def touch(tensor: torch.Tensor) -> float:
    """Write one byte of every 4 KiB page of a uint8 tensor with all cores; returns seconds."""
    num_threads = max(1, len(os.sched_getaffinity(0)))
    pages = tensor[: tensor.numel() // 4096 * 4096].view(-1, 4096)
    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda part: part[:, 0].fill_(1), pages.tensor_split(num_threads)))
    return time.perf_counter() - start


def copy_rates(num_bytes: int = GIB) -> list[Row]:
    """H2D and D2H alone and together, from pageable and from pinned memory."""
    device = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    other = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    rows: list[Row] = []

    def row(memory: str, direction: str, seconds: float, moved: int) -> None:
        gbps = moved / seconds / 1e9
        rows.append({"what": "copy", "memory": memory, "direction": direction, "bytes": num_bytes, "gbps": gbps})

    pageable = torch.ones(num_bytes, dtype=torch.uint8)
    row("pageable", "h2d", cuda_seconds(lambda: device.copy_(pageable)), num_bytes)
    row("pageable", "d2h", cuda_seconds(lambda: pageable.copy_(device)), num_bytes)
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    with pinned_buffer(num_bytes) as (first, _, _), pinned_buffer(num_bytes) as (second, _, _):
        row("pinned", "h2d", cuda_seconds(lambda: device.copy_(first, non_blocking=True)), num_bytes)
        row("pinned", "d2h", cuda_seconds(lambda: second.copy_(other, non_blocking=True)), num_bytes)

        def both() -> None:
            current = torch.cuda.current_stream()
            for stream, target, source in ((up, device, first), (down, second, other)):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
                current.wait_stream(stream)

        row("pinned", "h2d+d2h together", cuda_seconds(both), 2 * num_bytes)
    row("device", "d2d (read and written)", cuda_seconds(lambda: device.copy_(other)), 2 * num_bytes)
    return rows


def pin_times(sizes_gib: tuple[int, ...] = (1, 16, 64)) -> list[Row]:
    """Seconds to touch and to register host memory by size; a size the machine has not got is named, not tried."""
    rows: list[Row] = []
    for size in sizes_gib:
        available = memory_info()["MemAvailable"] / GIB
        row: Row = {"what": "pin", "gib": size, "mem_available_gib_before": available}
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        row["memlock_limit_bytes"] = limit if limit != resource.RLIM_INFINITY else None
        try:
            with pinned_buffer(size * GIB) as (_, touch_s, pin_s):
                row |= {"touch_s": touch_s, "pin_s": pin_s, "gib_per_s": size / pin_s}
        except (RuntimeError, OSError, ValueError) as error:
            row["error"] = str(error)
        rows.append(row)
    return rows


def memory_info() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) >= 2}


def host_memory() -> list[Row]:
    """What /proc/meminfo and the cgroup say now. A machine may grow: see the same row after the 64 GiB pin."""
    info = memory_info()
    cgroup = Path("/sys/fs/cgroup/memory.max")
    limit = cgroup.read_text().strip() if cgroup.exists() else "absent"
    shm = os.statvfs("/dev/shm")
    return [
        {
            "what": "host_memory",
            "mem_total_gib": info["MemTotal"] / GIB,
            "mem_available_gib": info["MemAvailable"] / GIB,
            "cgroup_memory_max": limit,
            "dev_shm_gib": shm.f_frsize * shm.f_blocks / GIB,
            "num_cores": len(os.sched_getaffinity(0)),
        }
    ]


def gemm_rates(sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)) -> list[Row]:
    """Square bf16 products on random data (zeros run faster than real data does), and one fp32 product."""
    rows: list[Row] = []
    for dtype, wanted in ((torch.bfloat16, sizes), (torch.float32, (4096,))):
        for n in wanted:
            a = torch.randn(n, n, device="cuda", dtype=dtype)
            b = torch.randn(n, n, device="cuda", dtype=dtype)
            seconds = cuda_seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            rows.append({"what": "gemm", "dtype": str(dtype)[6:], "n": n, "tflops": 2 * n**3 / seconds / 1e12})
    return rows


def disk_rates(folder: str | None = None, num_bytes: int = 8 * GIB, block_bytes: int = 8 * 2**20) -> list[Row]:
    """Sustained O_DIRECT write and read of one file by four threads; the file is removed afterwards.

    A file system without O_DIRECT gives a row with `direct: false` and the rate through the page cache.
    """
    folder = folder or tempfile.gettempdir()
    stat = os.statvfs(folder)
    free = stat.f_frsize * stat.f_bavail
    num_bytes = min(num_bytes, free // 2) // block_bytes * block_bytes
    row: Row = {"what": "disk", "folder_free_gib": free / GIB, "bytes": num_bytes, "block_bytes": block_bytes}
    path = Path(folder) / f"headrace-disk-{os.getpid()}.bin"
    try:
        handle, row["direct"] = _open_direct(path)
        try:
            os.posix_fallocate(handle, 0, num_bytes)
            row["write_gbps"] = _drive(handle, num_bytes, block_bytes, write=True)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            row["read_gbps"] = _drive(handle, num_bytes, block_bytes, write=False)
        finally:
            os.close(handle)
    finally:
        path.unlink(missing_ok=True)
    return [row]


def _open_direct(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError:
        return os.open(path, flags, 0o600), False


def _drive(handle: int, num_bytes: int, block_bytes: int, *, write: bool, num_threads: int = 4) -> float:
    """GB/s of moving the whole file once, blocks dealt to threads in turn."""
    num_blocks = num_bytes // block_bytes

    def worker(first: int) -> None:
        with mmap.mmap(-1, block_bytes) as block:
            block[:] = os.urandom(4096) * (block_bytes // 4096)
            for index in range(first, num_blocks, num_threads):
                offset = index * block_bytes
                moved = os.pwrite(handle, block, offset) if write else os.preadv(handle, [block], offset)
                if moved != block_bytes:
                    raise OSError(f"moved {moved} of {block_bytes} bytes at offset {offset}")

    start = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(worker, range(num_threads)))
    if write:
        os.fsync(handle)
    return num_blocks * block_bytes / (time.perf_counter() - start) / 1e9


def gds_state() -> list[Row]:
    """Whether GPUDirect Storage is real: the driver's files, and what KvikIO decides (compat mode is not real)."""
    row: Row = {"what": "gds", "nvidia_fs": Path("/proc/driver/nvidia-fs/stats").exists()}
    try:
        import kvikio
        import kvikio.defaults

        row["kvikio"] = kvikio.__version__
        row["compat_mode"] = str(kvikio.defaults.get("compat_mode"))
        row["real"] = bool(row["nvidia_fs"]) and not kvikio.defaults.is_compat_mode_preferred()
    except Exception as error:  # an import of KvikIO fails in many ways: no libcufile, no libcuda, an old driver
        row |= {"real": False, "why": f"{type(error).__name__}: {error}"}
    return [row]
