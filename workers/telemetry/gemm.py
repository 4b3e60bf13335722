"""The GEMM rate of a device: what utilisation is relative to where no datasheet says it."""

from __future__ import annotations

import time

import torch

from headrace.storage.core.errors import MachineError

MEASURE_S = 0.5
CPU_SIZES = (256, 512, 1024)
CUDA_SIZE = 8192
# One product of the next size (8 x the work) must leave time for a second one.
LONGEST_S = MEASURE_S / 12


def measure_gemm_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product in half a second of them, with torch's current number of threads.

    The sizes grow while one product stays short, so that a slow machine or dtype ends in time too (at most about 1 s).

    Args:
        device: cpu or cuda.
        dtype: of both factors and the result.

    Raises:
        MachineError: the device cannot multiply matrices of this dtype.
    """
    best = 0.0
    until_s = time.perf_counter() + MEASURE_S
    sizes = (CUDA_SIZE,) if device.type == "cuda" else CPU_SIZES
    try:
        for size in sizes:
            a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty(size, size, device=device, dtype=dtype)
            one_product_s(a, b, out)  # the first one pays for libraries and pages
            seconds = one_product_s(a, b, out)
            while size == sizes[-1] and time.perf_counter() < until_s:
                seconds = min(seconds, one_product_s(a, b, out))
            best = max(best, 2.0 * size**3 / seconds)
            if seconds > LONGEST_S:
                break
    except RuntimeError as error:
        raise MachineError(f"no matrix product of {dtype} on {device}: {error}") from error
    return best


def one_product_s(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    """Wall seconds of out = a @ b, until the device has finished."""
    wait(a.device)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    wait(a.device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
