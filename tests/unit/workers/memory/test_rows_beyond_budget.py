"""Rows many times longer than the device's budget holds run by chunk, within it. Long forms: test_long_rows.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.bench.model_shapes import model_shape
from headrace.kernels.api import Packing
from headrace.platform.planning import priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.errors import DeviceBudgetExceeded, InputError
from headrace.storage.core.records import Medium
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_sweep import OnChunk, no_chunk
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import MemoryPlan, Sweep
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.verify.ours import open_tiers

SMALL = replace(
    model_shape("llama_5m"), hidden_size=64, num_layers=3, intermediate_size=160, vocab_size=300, init_std=0.1
)
PROFILE = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)
LOSS_TILE = 128


def request_for(model: ModelConfig, seq_len: int, **more: object) -> PlanRequest:
    return PlanRequest(model=model, seq_len=seq_len, profile=PROFILE, loss_tile=LOSS_TILE, **more)  # type: ignore[arg-type]


def budget_of(model: ModelConfig, num_tokens: int) -> int:
    """What a step takes of the device that keeps everything of so many tokens."""
    request = request_for(model, num_tokens, preset=MemoryPreset.keep)
    return priced.wanted_bytes(solve_plan(request), request)[Medium.hbm]


def plan_within(model: ModelConfig, seq_len: int, chunk_size: int, budget_bytes: int) -> tuple[MemoryPlan, PlanRequest]:
    """Keys and values in HBM as far as it has room, then on the host and the SSD. By layer nothing fits."""
    request = request_for(
        model, seq_len, preset=MemoryPreset.chunk_auto, chunk_size=chunk_size, device_budget_bytes=budget_bytes
    )
    for preset in (MemoryPreset.keep, MemoryPreset.recompute):
        with pytest.raises(InputError, match=f"memory={preset.value} does not fit"):
            solve_plan(replace(request, preset=preset, chunk_size=None))
    plan = solve_plan(request)
    assert plan.sweep is Sweep.by_chunk
    return plan, request


def step(
    model: ModelConfig,
    plan: MemoryPlan,
    request: PlanRequest,
    budget_bytes: int | None,
    on_chunk: OnChunk = no_chunk,
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of one row, and the most bytes on the device."""
    decoder, meter = Decoder(model), DeviceMeter(budget_bytes)
    decoder.init_weights(0)
    seq_len, draw = request.seq_len, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (1, seq_len), generator=draw)
    batch = TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([seq_len]))
    wanted = priced.wanted_bytes(plan, request)
    with open_tiers(wanted, tokens.device, TransferLog()) as stack:
        handle = apply_plan(decoder, plan, stack, meter=meter, bucket_plans=None)
        sweep = open_sweep(decoder, handle, meter, loss_tile=LOSS_TILE, itemsize=4, on_chunk=on_chunk)
        try:
            loss = float(sweep.forward_backward(batch, seq_len, step=0, micro_batch=0))
        finally:
            sweep.close()
    return (
        loss,
        {name: param.grad for name, param in decoder.named_parameters() if param.grad is not None},
        meter.peak_bytes,
    )


def check_exact(model: ModelConfig, seq_len: int, chunk_size: int, budget_bytes: int) -> None:
    """The step by chunk within the budget has the gradients of the step by layer without one."""
    plan, request = plan_within(model, seq_len, chunk_size, budget_bytes)
    loss, found, peak = step(model, plan, request, budget_bytes)
    whole = replace(request, preset=MemoryPreset.keep, chunk_size=None, device_budget_bytes=None)
    wanted_loss, wanted, whole_peak = step(model, solve_plan(whole), whole, None)
    assert peak <= budget_bytes < whole_peak
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for name, grad in wanted.items():
        assert float((found[name] - grad).norm() / grad.norm()) <= 5e-5, name


def test_a_row_four_times_longer_than_the_device_holds_is_exact() -> None:
    check_exact(SMALL, 1536, 96, budget_of(SMALL, 384))


def test_a_row_sixteen_times_longer_runs_and_one_byte_less_ends_it() -> None:
    budget, seen = budget_of(SMALL, 96), []
    plan, request = plan_within(SMALL, 1536, 24, budget)
    *_, peak = step(SMALL, plan, request, budget, lambda *place: seen.append(place))
    assert seen[0] == (1, 1, 63)
    assert seen[-1] == (2, 64, 64)
    assert peak <= budget
    with pytest.raises(DeviceBudgetExceeded):
        step(SMALL, plan, request, peak - 1)
