"""Every case of `headrace bench kernels` on CUDA at small shapes: right results, memory, and times of the device."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest

from headrace.bench import kernel_attention, kernel_block, kernel_codec, kernel_loss
from headrace.bench.harness import Row
from headrace.bench.kernel_case import OURS, Case
from headrace.bench.kernel_child import Bench
from headrace.bench.kernel_settings import DEFAULTS, read_settings
from headrace.bench.kernel_targets import with_agreement

pytestmark = pytest.mark.gpu
PARTS = {
    "loss": kernel_loss,
    "attention": kernel_attention,
    "block": kernel_block,
    "codec": kernel_codec,
}


def small_cases(part: str, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """CUDA's contenders at the CPU's shapes."""
    module: ModuleType = PARTS[part]
    for name in ("SIZES", "SHAPE"):
        if hasattr(module, f"CUDA_{name}"):
            monkeypatch.setattr(module, f"CUDA_{name}", getattr(module, f"CPU_{name}"))
    settings = read_settings({**DEFAULTS, "device": "cuda", "shapes": "512x8192x256"})
    return module.cases(settings)


@pytest.mark.parametrize("part", PARTS)
def test_our_cases_are_right(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    for case in small_cases(part, monkeypatch):
        if case.family != OURS:
            continue
        made = bench.prepare(case)
        row = with_agreement(case, Row(case.name, made["numbers"]))
        assert row.target is None or row.target.met, row
        assert made["numbers"]["extra_mib"] >= 0
        assert bench.round(case.name)["numbers"]["total_ms"] > 0
    bench.drop()


def test_the_loss_takes_its_gradients_and_its_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MiB of workspace where the whole logits would be 256 MiB."""
    case = next(case for case in small_cases("loss", monkeypatch) if case.contender == "ours")
    shape = {"tokens": 4096, "vocab": 16384, "width": 256}
    small = replace(case, shape=shape, options={**case.options, "workspace_bytes": 8 * 2**20})
    extra_mib = Bench().prepare(small)["numbers"]["extra_mib"]
    gradients_mib = 4 * (shape["tokens"] + shape["vocab"]) * shape["width"] / 2**20
    assert extra_mib < gradients_mib + 8 + 16, "the gradients in fp32, the workspace, and small change"


def test_times_are_the_devices() -> None:
    """A product of 2 TFLOP cannot be over in the time in which the host queues it."""
    case = next(
        case
        for case in kernel_loss.cases(read_settings({**DEFAULTS, "device": "cuda", "shapes": "8192x16384x8192"}))
        if case.contender == "limit_gemm_logits"
    )
    bench = Bench()
    bench.prepare(case)
    numbers = bench.round(case.name)["numbers"]
    peak_tflops = 2500  # above any device of today in bf16
    assert 2 * 8192 * 16384 * 8192 / 1e9 / numbers["forward_ms"] < peak_tflops
    assert numbers["forward_tflops"] == pytest.approx(2 * 8192 * 16384 * 8192 / 1e9 / numbers["forward_ms"])
    bench.drop()
