"""Whether an error means that the device's memory is used up, and what the allocator had at its peaks.

torch's allocator has an exception of its own. Libraries that allocate past it raise a RuntimeError in their own words:
cuDNN and cuBLAS name a status, NCCL and Triton quote the CUDA error.
"""

from __future__ import annotations

import re

import torch

from headrace.storage.core.errors import DeviceBudgetExceeded

GIB = 1024**3
_WORDS = re.compile(
    r"CUDA(?: driver)? error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|CU(?:BLAS|SOLVER|SPARSE|DNN)_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
    r"|Cuda failure (?:2 )?'out of memory'|Failed to CUDA (?:malloc|calloc)|Triton Error \[CUDA\]: out of memory"
    r"|CUDA out of memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, says that the device is full."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        if isinstance(each, torch.OutOfMemoryError | DeviceBudgetExceeded):
            return True
        if isinstance(each, RuntimeError) and _WORDS.search(str(each)):
            return True
        each = each.__cause__
    return False


def memory_peaks(device: torch.device) -> dict[str, float | int]:
    """The allocator's peaks since their last reset, in GiB, and how often it had to free its cache and ask again.

    Empty on the CPU, where the allocator counts nothing.
    """
    if device.type != "cuda":
        return {}
    return {
        "peak_device_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_device_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "num_alloc_retries": int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)),
    }
