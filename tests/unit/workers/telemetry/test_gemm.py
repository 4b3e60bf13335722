from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from headrace.storage.core.errors import MachineError
from headrace.workers.telemetry import gemm
from headrace.workers.telemetry.gemm import measure_gemm_flops


class Machine:
    """A device with a clock of its own: a product takes its FLOPs over `rate`, the first of its size twice that."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now_s, self.sizes = rate, 0.0, []

    def mm(self, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> None:
        slowness = 1 if len(a) in self.sizes else 2
        self.sizes.append(len(a))
        self.now_s += slowness * 2 * len(a) ** 3 / self.rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [5e8, 4e9, 1e12])
def test_is_short_and_right_on_machines_slow_and_fast(
    rate: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(rate)
    monkeypatch.setattr(gemm, "time", SimpleNamespace(perf_counter=lambda: machine.now_s))
    monkeypatch.setattr(torch, "mm", machine.mm)
    assert measure_gemm_flops(torch.device("cpu"), dtype) == pytest.approx(rate)
    assert machine.now_s < 2 * gemm.MEASURE_S
    assert set(machine.sizes) == ({256} if rate == 5e8 else {256, 512} if rate == 4e9 else {256, 512, 1024})


def test_the_clock_is_that_of_a_product() -> None:
    rate = measure_gemm_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e15


def test_a_dtype_without_products_is_an_error() -> None:
    with pytest.raises(MachineError, match="bool"):
        measure_gemm_flops(torch.device("cpu"), torch.bool)


@pytest.mark.gpu
def test_cuda_rate_is_a_rate_of_the_device() -> None:
    rate = measure_gemm_flops(torch.device("cuda"), torch.bfloat16)
    assert 1e13 < rate < 5e15
