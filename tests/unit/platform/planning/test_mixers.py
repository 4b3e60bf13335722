"""Models whose layers scan: what the planner predicts is what a run moves and holds."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from headrace.helpers.linear_attention import LINEAR_ATTENTION
from headrace.helpers.tiers import FakeTier, open_fake_stack
from headrace.helpers.tiny_models import LLAMA
from headrace.kernels.api import Packing
from headrace.platform.planning import priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import explain
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.lengths import solve_plans
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.adapter import num_params
from headrace.workers.model.config import ATTENTION, AdapterConfig, AdapterKind, ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.telemetry.flops import MicroBatch, again_flops, step_flops

SEQ_LEN, TILE = 640, 64
HYBRID = replace(
    LLAMA,
    vocab_size=300,
    hidden_size=64,
    num_layers=5,
    intermediate_size=160,
    mixers=[LINEAR_ATTENTION, LINEAR_ATTENTION, ATTENTION],
)
SCANS = replace(HYBRID, num_layers=3, mixers=[LINEAR_ATTENTION])
PROFILE = HardwareProfile(
    name="any",
    device_class=DeviceClass.cpu,
    fp32_tflops=0.05,
    d2h_gbps=5,
    h2d_gbps=5,
    ssd_write_gbps=1,
    ssd_read_gbps=2,
)


def asked(model: ModelConfig = HYBRID, preset: str = "auto", **more: object) -> PlanRequest:
    sizes = {"seq_len": SEQ_LEN, "chunk_size": 160 if preset.startswith("chunk") else None, "loss_tile": 64}
    given = {"model": model, "profile": PROFILE, "preset": MemoryPreset(preset), **sizes, **more}
    return PlanRequest(**given)  # type: ignore[arg-type]


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token tiles that a row has several of."""
    right = PlanRequest.cuts
    monkeypatch.setattr(PlanRequest, "cuts", lambda self: replace(right(self), token_tile=TILE))


def measured(plan: MemoryPlan, model: ModelConfig) -> tuple[int, dict[Medium, tuple[int, int]]]:
    """Peak of the device, and bytes stored to and loaded from every tier, of one micro-batch."""
    decoder, meter = Decoder(model), DeviceMeter()
    decoder.init_weights(0)
    for param in decoder.parameters():
        param.grad = torch.zeros_like(param)
    tokens = torch.randint(0, model.vocab_size, (1, SEQ_LEN))
    stack = open_fake_stack([FakeTier(1 << 25, medium=Medium.host), FakeTier(1 << 25)])
    try:
        sweep = open_sweep(
            decoder,
            apply_plan(decoder, plan, stack, meter=meter, bucket_plans=None),
            meter,
            loss_tile=64,
            itemsize=4,
        )
        sweep.forward_backward(TokenBatch(tokens, tokens, Packing.of_lengths([SEQ_LEN])), 1.0, step=0, micro_batch=0)
        sweep.close()
        return meter.peak_bytes, {m: (found.stored_bytes, found.loaded_bytes) for m, found in stack.stats().items()}
    finally:
        stack.close()


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        (HYBRID, "keep"),
        (HYBRID, "recompute"),
        (HYBRID, "memo"),
        (HYBRID, "ssdtrain"),
        (HYBRID, "offload_ssd"),
        (HYBRID, "chunk"),
        (HYBRID, "chunk_host"),
        (SCANS, "chunk_ssd"),
        (SCANS, "offload_host"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
@pytest.mark.usefixtures("short_tiles")
def test_predicted_is_measured(model: ModelConfig, preset: str) -> None:
    request = asked(model, preset)
    plan = solve_plan(request)
    wanted, work = priced.wanted_bytes(plan, request), priced.work_of(plan, request)
    peak, moved = measured(plan, model)
    # How many KV blocks are on their way at the peak depends on the threads; the planner counts the most.
    slack = 0.05 if preset == "chunk_host" else 0.02
    assert peak * 0.98 <= wanted[Medium.hbm] <= peak * (1 + slack)
    assert moved.get(Medium.ssd, (0, 0)) == (work.ssd, work.load_ssd)
    assert moved.get(Medium.host, (0, 0)) == (work.host, work.load_host)


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig(kind=AdapterKind.lora)], ids=["full", "lora"])
def test_parameters_and_flops_are_those_of_every_layer(adapter: AdapterConfig) -> None:
    for model in (HYBRID, SCANS, replace(HYBRID, mixers=[ATTENTION])):
        assert num_params(model) == sum(param.numel() for param in Decoder(model, device="meta").parameters())
    # Five layers are three that scan, one that attends, and one that attends or scans, by the pattern.
    of = {
        number: step_flops(replace(HYBRID, num_layers=number), [SEQ_LEN], causal=True, adapter=adapter)
        for number in (2, 3, 4, 5)
    }
    assert of[4] - of[3] == of[5] - of[4] != of[3] - of[2]
    plan = solve_plan(asked(preset="recompute", adapter=adapter))
    each = [
        again_flops(
            replace(HYBRID, num_layers=n), MicroBatch([SEQ_LEN], replace(plan, layers=plan.layers[:n])), adapter
        )
        for n in (2, 3, 4, 5)
    ]
    assert each[2] - each[1] == each[3] - each[2] != each[1] - each[0]


def test_auto_is_the_fastest_preset_that_fits() -> None:
    keeps = solve_plan(asked())
    assert (keeps.name, keeps.solver) == ("auto", "fastest preset: memory=keep")
    whole = priced.wanted_bytes(keeps, asked())[Medium.hbm]
    tried = {}
    for preset in ("keep", "recompute", "memo", "ssdtrain", "offload_host", "offload_ssd", "chunk_auto"):
        own = asked(preset=preset, chunk_size=None)
        plan = solve_plan(own)
        tried[preset] = priced.wanted_bytes(plan, own)[Medium.hbm], priced.seconds(plan, own).total
    for share in (0.9, 0.6):
        small = asked(device_budget_bytes=int(share * whole))
        found = solve_plan(small)
        fitting = [seconds for peak, seconds in tried.values() if peak <= share * whole]
        assert priced.wanted_bytes(found, small)[Medium.hbm] <= share * whole
        assert priced.seconds(found, small).total <= min(fitting)
    with pytest.raises(InputError, match=r"memory=auto does not fit(.|\n)*tiers.device.budget_gib="):
        solve_plan(asked(device_budget_bytes=1 << 16))


def test_a_plan_names_the_mixers_of_its_layers() -> None:
    text = explain(solve_plan(asked(preset="chunk_host")), asked(preset="chunk_host"))
    assert re.search(r"^4 of 0-4 +\S+ \S+ +linear_attention, device: all$", text, re.MULTILINE), text
    assert re.search(r"^2 +\S+ \S+ +attention, device: all$", text, re.MULTILINE), text
    assert "a state of a scan lives where a KV block would" in text
    assert "\nfastest preset: memory=keep\n" in explain(solve_plan(asked()), asked())
    buckets = asked(buckets=(320, SEQ_LEN), batch_size=2)
    assert {plan.solver for plan in solve_plans(buckets).values()} == {"fastest preset: memory=keep"}


def test_one_kind_of_layers_is_solved_as_ever() -> None:
    request = asked(
        SCANS, device_budget_bytes=int(0.7 * priced.wanted_bytes(solve_plan(asked(SCANS)), asked(SCANS))[Medium.hbm])
    )
    plan = solve_plan(request)
    assert "preset" not in plan.solver
    assert priced.wanted_bytes(plan, request)[Medium.hbm] <= request.device_budget_bytes


def test_pages_are_refused() -> None:
    with pytest.raises(InputError, match="memory=chunk_sparse: a layer that scans has no pages"):
        solve_plan(asked(preset="chunk_sparse"))
