"""Out of memory is recognised by the words of whoever ran out, and by nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headrace.storage.core.errors import DeviceBudgetExceeded, InputError, TierFull
from headrace.workers.memory.meter import CudaMeter
from headrace.workers.memory.out_of_memory import is_out_of_memory, memory_peaks

FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    DeviceBudgetExceeded("device: more wanted"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN Frontend error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    RuntimeError("Failed to CUDA calloc async 608 bytes"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
)
OTHER = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    MemoryError("out of memory"),
    ValueError("CUDA error: out of memory"),
    TierFull("host tier: no room"),
    InputError("tiers.device.budget_gib"),
)


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_device_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    outer = ValueError("the step failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_circle_of_causes_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)


def test_the_cuda_meter_names_the_budget_for_a_library_too() -> None:
    meter = CudaMeter.__new__(CudaMeter)
    meter.budget_bytes = 1 << 30
    with pytest.raises(DeviceBudgetExceeded, match=r"tiers\.device\.budget_gib"), meter:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    with pytest.raises(RuntimeError, match="illegal"), meter:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_the_cuda_meter_adds_what_the_allocator_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved, shares = [60], []
    cuda = {
        "get_device_properties": lambda _: SimpleNamespace(total_memory=200),
        "set_per_process_memory_fraction": lambda share, _: shares.append(share),
        "memory_reserved": lambda _: reserved[0],
        "max_memory_allocated": lambda _: 50,
        "reset_peak_memory_stats": lambda _: None,
        "empty_cache": lambda: reserved.__setitem__(0, 40),
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    meter = CudaMeter(torch.device("cuda"), 100)
    first, second = meter.beside(30), meter.beside(20)
    assert (shares, meter.peak_bytes, reserved) == ([0.5, 0.35, 0.25], 100, [40])
    with pytest.raises(DeviceBudgetExceeded, match="111 bytes"):
        meter.beside(21)
    second.release()
    second.release()
    assert (shares[-1], meter.peak_bytes) == (0.35, 100)
    meter.reset_peak()
    assert meter.peak_bytes == 80
    first.release()
    assert shares[-1] == 0.5


def test_the_cpu_has_no_peaks() -> None:
    assert memory_peaks(torch.device("cpu")) == {}
