from __future__ import annotations

import time

import pytest
import torch

from headrace.storage.core.errors import MachineError
from headrace.workers.telemetry.gemm import measure_gemm_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_short_and_near_a_second_measurement(dtype: torch.dtype) -> None:
    start = time.perf_counter()
    rate = measure_gemm_flops(torch.device("cpu"), dtype)
    assert time.perf_counter() - start < 3.0  # half a second by design; the machine is shared
    size = 384
    a, b = (torch.rand(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    mine = 2 * size**3 / min(seconds)
    assert mine / 4 < rate < mine * 8


def test_a_dtype_without_products_is_an_error() -> None:
    with pytest.raises(MachineError, match="bool"):
        measure_gemm_flops(torch.device("cpu"), torch.bool)


@pytest.mark.gpu
def test_cuda_rate_is_a_rate_of_the_device() -> None:
    rate = measure_gemm_flops(torch.device("cuda"), torch.bfloat16)
    assert 1e13 < rate < 5e15
