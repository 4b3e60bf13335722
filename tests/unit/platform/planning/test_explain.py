from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import binding_tiers, explain, size, to_json
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.predict import Treatment, device_peak_bytes, treatment_of
from headrace.platform.planning.request import PlanRequest
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.config import Family, ModelConfig

MIB = 1 << 20
MODEL = ModelConfig(
    name="tiny",
    family=Family.llama,
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=512,
)
CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)
RATED = replace(CPU, fp32_tflops=0.05, d2h_gbps=5.0, h2d_gbps=5.0, ssd_write_gbps=0.5, ssd_read_gbps=0.5)
REQUEST = PlanRequest(model=MODEL, seq_len=4096, profile=CPU, host_budget_bytes=8 * MIB, micro_batches=2)


def two_blocks(request: PlanRequest) -> int:
    """Room for two blocks that keep their tensors, and not for three."""
    cost = request.cost()
    layers = (Treatment.host,) * 2 + (Treatment.keep,) * 2
    return device_peak_bytes(cost.of(layers), request.prefetch_layers, cost)


def test_what_goes_where_and_what_binds() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST))
    plan = solve_plan(request)
    text = explain(plan, request)
    rows = [line.split() for line in text.splitlines()]
    keep = request.cost().blocks[Treatment.keep]
    assert ["2-3", *size(keep.held).split(), "device:", "all"] in rows
    assert ["0-1", "0", "B", "host:", "x;", "recompute:", "q", "k", "v", "out", "lse", "residual", "gate", "up"] in rows
    assert "device" in binding_tiers(plan, request)
    assert "<- binds" in text
    assert "moves in a step: 16 MiB to the host and 16 MiB back, 0 B to the SSD and 0 B back" in text
    assert "unknown: hardware.fp32_tflops" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_help_that_is_promised_helps() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST), profile=RATED)
    plan = solve_plan(request)
    assert "what would help: " in explain(plan, request)
    more = replace(request, device_budget_bytes=two_blocks(request) + request.cost().blocks[Treatment.keep].held)
    assert sum(treatment_of(layer) is Treatment.keep for layer in solve_plan(more).layers) == 3
    assert "memory=auto finds a faster plan" in explain(
        solve_plan(replace(request, preset=MemoryPreset.recompute)), replace(request, preset=MemoryPreset.recompute)
    )
    keep = replace(request, preset=MemoryPreset.keep, device_budget_bytes=None)
    assert "nothing to gain" in explain(solve_plan(keep), keep)


def test_the_parts_of_the_step_add_up_to_the_prediction() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST), profile=RATED)
    plan = solve_plan(request)
    line = next(line for line in explain(plan, request).splitlines() if line.startswith("step: "))
    total, compute, recompute, exposed = (float(w) for w in line.replace("=", " ").split() if w[0].isdigit())
    assert total == pytest.approx(plan.predicted["perf/step_s"], rel=1e-2)
    assert total == pytest.approx(compute + recompute + exposed, rel=2e-2)


def test_json_form() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST))
    plan = solve_plan(request)
    data = json.loads(json.dumps(to_json(plan, request)))
    assert data["plan"] == plan.to_dict()
    assert data["tiers"]["device"]["budget_bytes"] == request.device_budget_bytes
    assert data["tiers"]["device"]["wanted_bytes"] <= request.device_budget_bytes
    assert data["unknown_rates"] == ["flops", "d2h", "h2d"]
    assert "perf/step_s" not in data["predicted"]


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5 GiB"]
