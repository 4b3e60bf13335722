"""Solved plans run: the bits of the twin that keeps everything, the planned bytes, the predicted peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.helpers import tiny_models
from headrace.helpers.live_bytes import LiveBytes
from headrace.platform.planning import cost, priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan, Residence, check_plan, keep_layer
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.model.decoder import Decoder

LLAMA = replace(tiny_models.LLAMA, vocab_size=300, hidden_size=64, num_layers=6, intermediate_size=160)
QWEN3 = replace(LLAMA, family=Family.qwen3, qk_norm=True, head_dim=32, tie_embeddings=True)
# Rates that make recomputation, the host and the SSD cost about the same.
PROFILE = HardwareProfile(
    name="cpu",
    device_class=DeviceClass.cpu,
    evidence=Evidence.measured,
    fp32_tflops=0.02,
    d2h_gbps=0.2,
    h2d_gbps=0.2,
    ssd_write_gbps=0.1,
    ssd_read_gbps=0.1,
    compute_efficiency=1.0,
)
LOSS_TILE = 128


def asked(model: ModelConfig, seq_len: int, device: float, host: float, ssd: float) -> PlanRequest:
    """Budgets as shares: of what `keep` and `offload_host` take of the device, and of what `keep` holds."""
    request = PlanRequest(model=model, seq_len=seq_len, profile=PROFILE, loss_tile=LOSS_TILE)
    most, least = (
        priced.wanted_bytes(solve_plan(replace(request, preset=preset)), request)[Medium.hbm]
        for preset in (MemoryPreset.keep, MemoryPreset.offload_host)
    )
    held = model.num_layers * request.shape().cost(keep_layer(request.skeleton())).held
    return replace(
        request,
        device_budget_bytes=int(least + device * (most - least)),
        host_budget_bytes=int(host * held),
        ssd_budget_bytes=int(ssd * held),
    )


def places(plan: MemoryPlan, request: PlanRequest) -> set[Residence]:
    names = request.skeleton().skeletal
    tokens = range(0, request.seq_len, plan.cuts.token_tile)
    return {layer.residence(name, token) for layer in plan.layers for name in names for token in tokens}


def gradients(model: Decoder, plan: MemoryPlan, stack, seq_len: int) -> list[torch.Tensor]:
    tokens = torch.randint(0, 300, (1, seq_len), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    handle = apply_memory(model.blocks, plan, stack, norm=model.norm)
    try:
        handle.begin(0, 0)
        loss = model(tokens, tokens.roll(-1, 1), loss_tile=LOSS_TILE)
        loss.backward()
        handle.end()
    finally:
        handle.remove()
    return [loss.detach(), *(param.grad.clone() for param in model.parameters())]


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.TOKEN_TILE, DeviceClass.cpu, 8)


CONFIGURATIONS = {
    "a roomy device": (LLAMA, 0.6, 0.2, 0.0),
    "a tight device": (LLAMA, 0.05, 0.1, 0.3),
    "no SSD": (QWEN3, 0.2, 0.3, 0.0),
    "host and SSD": (QWEN3, 0.1, 0.06, 0.4),
}


@pytest.mark.usefixtures("short_tiles")
def test_solved_plans_compute_the_bits_of_their_keep_twin(make_scripted_stack) -> None:
    """And move exactly the planned bytes. Each mixes places; together they mix all four in one plan."""
    mixed = set()
    for model_config, *shares in CONFIGURATIONS.values():
        request = asked(model_config, 52, *shares)
        plan = solve_plan(request)
        mixed.add(frozenset(places(plan, request)))
        model = Decoder(model_config)
        model.init_weights(0)
        skeletons = skeletons_of(model.blocks)
        check_plan(plan, skeletons)
        stack = make_scripted_stack()
        kept = gradients(model, plan.keep_twin(skeletons), None, 52)
        found = gradients(model, plan, stack, 52)
        assert all(map(torch.equal, found, kept))
        sizes = {"batch_size": 1, "num_tokens": 52, "itemsize": 4}
        for way in Direction:
            planned = moved_bytes(plan, skeletons, **sizes, direction=way)
            assert {tier: stack.moved[way.value, tier] for tier in planned} == planned
        work = priced.work_of(plan, request)
        assert stack.moved["store", Medium.host] == work.host
        assert stack.moved["load", Medium.ssd] == work.load_ssd
    assert min(map(len, mixed)) >= 2
    assert frozenset(Residence) in mixed


def check_peak(name: str, seq_len: int, stack) -> None:
    model_config, *shares = CONFIGURATIONS[name]
    request = asked(model_config, seq_len, *shares)
    plan = solve_plan(request)
    model = Decoder(model_config)
    model.init_weights(0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    tokens = torch.randint(0, 300, (1, seq_len))
    handle = apply_memory(model.blocks, plan, stack, norm=model.norm)
    with torch.no_grad():
        model(tokens[:, :1])  # the tables of frequencies are made once
    handle.begin(0, 0)
    with LiveBytes([*model.parameters(), *(p.grad for p in model.parameters()), tokens]) as live:
        model(tokens, tokens, loss_tile=LOSS_TILE).backward()
    handle.end()
    predicted = priced.wanted_bytes(plan, request)[Medium.hbm]
    assert predicted == pytest.approx(live.peak, rel=0.02)
    assert predicted <= request.device_budget_bytes


@pytest.mark.parametrize("name", ["host and SSD"])
def test_the_predicted_peak_of_a_solved_plan_is_live(name: str, make_scripted_stack) -> None:
    check_peak(name, 1200, make_scripted_stack())


@pytest.mark.soak
@pytest.mark.parametrize("seq_len", [1024, 3000, 6000])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_predicted_peak_of_a_solved_plan_is_live_at_many_lengths(
    name: str, seq_len: int, make_scripted_stack
) -> None:
    check_peak(name, seq_len, make_scripted_stack())
