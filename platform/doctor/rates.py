"""Rates of the machine that every later target is relative to: copies, pinning, GEMM. (The drive: host_rates.py.)

Each function measures one thing and returns plain JSON-able rows. Rates are GB/s (1e9 bytes) and TFLOP/s (1e12);
sizes are GiB (2**30). Times come from CUDA events where the work is on the device and from the wall clock elsewhere.
"""

from __future__ import annotations

import mmap
import os
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from headrace.platform.children import Row
from headrace.platform.doctor.check import GIB
from headrace.platform.doctor.host_rates import memory_info
from headrace.storage.transfer import clear_last_error


def host_copy_gbps(num_bytes: int = GIB // 4, *, num_calls: int = 5) -> float:
    """GB/s of copying one host tensor to another with torch's threads: bytes of the tensor per second, best call."""
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    target.copy_(source)  # the first call pays for the pages
    best = float("inf")
    for _ in range(num_calls):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return num_bytes / best / 1e9


def cuda_seconds(work: Callable[[], Any], *, min_s: float = 0.3) -> float:
    """Median seconds of one call of `work` on the device, after one call to warm up.

    Calls until `min_s` of device time has been measured, at least three times (once where one call takes over 2 s).
    """
    work()
    first = _one_call(work)
    if first > 2.0:
        return first
    samples = [first]
    while (len(samples) < 3 or sum(samples) < min_s) and len(samples) < 200:
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
    region = mmap.mmap(-1, num_bytes)  # given back with the tensor, which holds the buffer
    tensor = torch.frombuffer(region, dtype=torch.uint8)
    touch_s = touch(tensor)
    start = time.perf_counter()
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
    pin_s = time.perf_counter() - start
    if code != 0:
        clear_last_error(torch.device("cuda"))
        raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed with code {code}")
    try:
        yield tensor, touch_s, pin_s
    finally:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


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


def pin_times(sizes_gib: tuple[int, ...] = (1, 16, 64)) -> Iterator[Row]:
    """Seconds to touch and to register host memory by size, smallest first.

    A size beyond what seems free is tried all the same: some virtual machines grow as memory is used, and what they
    have in the end is `mem_total_gib_after`. The process may be killed for it, so the rows before it are out already.
    """
    for size in sizes_gib:
        row: Row = {"what": "pin", "gib": size, "mem_available_gib_before": memory_info()["MemAvailable"] / GIB}
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        row["memlock_limit_bytes"] = limit if limit != resource.RLIM_INFINITY else None
        try:
            with pinned_buffer(size * GIB) as (_, touch_s, pin_s):
                row |= {"touch_s": touch_s, "pin_s": pin_s, "gib_per_s": size / pin_s}
                row["mem_total_gib_after"] = memory_info()["MemTotal"] / GIB
        except (RuntimeError, OSError, ValueError) as error:
            row["error"] = str(error)
        yield row


def cpu_rates() -> Iterator[Row]:
    """Without a GPU: copies within host memory, and products on the CPU in both dtypes that train there."""
    from headrace.workers.telemetry.gemm import measure_gemm_flops

    yield {"what": "host_copy", "num_threads": torch.get_num_threads(), "gbps": host_copy_gbps()}
    for dtype in (torch.float32, torch.bfloat16):
        flops = measure_gemm_flops(torch.device("cpu"), dtype)
        row: Row = {"what": "cpu_gemm", "dtype": str(dtype)[6:], "num_threads": torch.get_num_threads()}
        yield row | {"tflops": flops / 1e12}


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
