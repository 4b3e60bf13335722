from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from headrace.helpers.planning import QWEN_7B, TINY
from headrace.kernels.codecs.config import CodecName
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import explain, size, to_json
from headrace.platform.planning.figures import MOVED, TIMED, figures
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.priced import seconds, wanted_bytes, work_of
from headrace.platform.planning.problem import GAP
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, keep_layer

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)
RATED = replace(CPU, fp32_tflops=0.05, d2h_gbps=5.0, h2d_gbps=5.0, ssd_write_gbps=0.5, ssd_read_gbps=0.5)

MIB = 1 << 20
SLOW = replace(RATED, fp32_tflops=5.0, d2h_gbps=0.5, h2d_gbps=0.5, ssd_write_gbps=0.1, ssd_read_gbps=0.1)
REQUEST = PlanRequest(model=TINY, seq_len=4096, profile=CPU, host_budget_bytes=8 * MIB, micro_batches=2)


def two_blocks(request: PlanRequest) -> int:
    """Room for two blocks that keep their tensors, and not for three."""
    keep, host = keep_layer(request.skeleton()), LayerPlan.of(x=Residence.host)
    plan = MemoryPlan("two", (host, host, keep, keep), cuts=request.cuts())
    return wanted_bytes(plan, request)[Medium.hbm]


def test_what_goes_where_and_what_binds() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST))
    plan = solve_plan(request)
    text = explain(plan, request)
    rows = [line.split() for line in text.splitlines()]
    for layer in (0, 3):
        held = size(request.shape().cost(plan.layers[layer]).held).split()
        assert any(str(layer) in row[0].split("-") and row[1:3] == held for row in rows if row), text
    assert "device" in to_json(plan, request)["binding"]
    assert "<- binds" in text
    work = work_of(plan, request)
    assert f"moves in a step: {size(2 * work.host)} to the host and {size(2 * work.load_host)} back" in text
    assert "unknown: hardware.fp32_tflops" in text
    assert max(map(len, text.splitlines())) <= 120


def test_treatments_that_take_turns_have_one_line_each() -> None:
    request = replace(REQUEST, model=replace(TINY, num_layers=7), host_budget_bytes=None)
    host, ssd = LayerPlan.of(x=Residence.host), LayerPlan.of(x=Residence.ssd)
    plan = MemoryPlan("turns", (host, ssd, host, ssd, host, ssd, keep_layer(request.skeleton())), cuts=request.cuts())
    rows = [" ".join(line.split()) for line in explain(plan, request).splitlines()]
    again = "recompute: q k v out lse residual gate up"
    assert f"3 of 0-4 0 B host: x; {again}" in rows
    assert f"3 of 1-5 0 B ssd: x; {again}" in rows
    assert any(row.startswith("6 ") for row in rows)


def test_a_plan_of_other_budgets_is_explained() -> None:
    """As with data.buckets: the plan of shorter rows is made for what the longest rows use."""
    tight = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST), profile=SLOW)
    plan = solve_plan(tight)
    for other in (replace(tight, host_budget_bytes=5 * MIB), replace(tight, host_budget_bytes=40 * MIB)):
        strange = replace(plan, layers=(LayerPlan.of(x=Residence.host, up=Residence.hbm), *plan.layers[1:]))
        assert "step: " in explain(strange, other)


def test_the_help_that_is_promised_helps() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST), profile=SLOW)
    plan = solve_plan(request)
    more, shorter = promised(explain(plan, request))
    helped = solve_plan(replace(request, device_budget_bytes=request.device_budget_bytes + more))
    gain = plan.predicted["perf/step_s"] - helped.predicted["perf/step_s"]
    assert gain > 0.9 * shorter - 2 * GAP * plan.predicted["perf/step_s"]
    recompute = replace(request, preset=MemoryPreset.recompute)
    assert "memory=auto finds a faster plan" in explain(solve_plan(recompute), recompute)
    keep = replace(request, preset=MemoryPreset.keep, device_budget_bytes=None)
    assert "nothing to gain" in explain(solve_plan(keep), keep)


def promised(text: str) -> tuple[int, float]:
    """Bytes more of the device, and seconds, that a plan's text promises."""
    number, unit, seconds = re.search(
        r"([\d.]+) ([KMG]iB) more device make the step ([\d.e-]+) s shorter", text
    ).groups()
    return math.ceil(float(number) * 1.001 * 1024 ** (1 + "KMG".index(unit[0]))), float(seconds)


def test_the_parts_of_the_step_add_up_to_the_prediction() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST), profile=RATED)
    plan = solve_plan(request)
    line = next(line for line in explain(plan, request).splitlines() if line.startswith("step: "))
    total, compute, recompute, exposed = (float(w) for w in line.replace("=", " ").split() if w[0].isdigit())
    assert total == pytest.approx(plan.predicted["perf/step_s"], rel=1e-2)
    assert total == pytest.approx(compute + recompute + exposed, rel=2e-2)


def test_a_codec_is_not_free() -> None:
    """Gate, up and residual of 7 billion parameters in 8 bits: its passes at the memory's rate; auto computes again."""
    profile = HardwareProfile(name="gpu", device_memory_gib=139.8, bf16_tflops=989.4, h2d_gbps=63, d2h_gbps=63)
    profile = replace(profile, memory_gbps=4800.0)
    request = PlanRequest(model=QWEN_7B, seq_len=65536, profile=profile, itemsize=2, num_shards=8)
    request = replace(request, codec=CodecName.eight_bit_token, preset=MemoryPreset.keep)
    unknown = replace(request, profile=replace(profile, memory_gbps=None))
    plan = asked_plan(request)
    codec_s = seconds(plan, request).total - seconds(plan, unknown).total
    width = 2 * QWEN_7B.intermediate_size + QWEN_7B.hidden_size
    assert codec_s == pytest.approx(28 * 65536 * width * (715 + 23 + 2 * 6) / (4800e9 * 0.8))
    assert f"; lossy; {codec_s:.3g} s of the step below, with the plain kernels" in explain(plan, request)
    text = explain(plan, unknown)
    assert "lossy; its time is not in the step below: set hardware.memory_gbps" in text
    assert max(map(len, text.splitlines())) <= 120
    found = [figures(plan, each) for each in (request, unknown)]
    hardware_flops = [each["hfu_pct"] * each["step_s"] for each in found]
    assert hardware_flops[0] == pytest.approx(hardware_flops[1]), "a codec computes no product"
    free, priced = (find_plan(replace(each, preset=MemoryPreset.auto)) for each in (unknown, request))
    held = [{row.residence("gate", 0) is not Residence.recompute for row in found.layers} for found in (free, priced)]
    assert held == [{True}, {False}]
    assert seconds(priced, request).total < seconds(free, request).total
    assert "recomputed in backward: 28 of 28 blocks" in explain(priced, request)


def test_json_form() -> None:
    request = replace(REQUEST, device_budget_bytes=two_blocks(REQUEST))
    plan = solve_plan(request)
    data = json.loads(json.dumps(to_json(plan, request)))
    assert data["plan"] == plan.to_dict()
    assert data["tiers"]["device"]["budget_bytes"] == request.device_budget_bytes
    assert data["tiers"]["device"]["wanted_bytes"] <= request.device_budget_bytes
    assert data["unknown_rates"] == ["flops", "d2h", "h2d"]
    assert data["predicted"]["step_s"] is None
    assert data["predicted"]["gpu_peak_gib"] == plan.predicted["mem/gpu_peak_gib"]


def test_the_figures_of_a_step() -> None:
    """Against the metrics of the same plan and closed forms: two ranks of a node with two micro-batches each."""
    request = replace(
        REQUEST, device_budget_bytes=two_blocks(REQUEST), host_budget_bytes=0, profile=RATED, ranks_per_node=2
    )
    exposed = replace(request, preset=MemoryPreset.offload_ssd, profile=replace(RATED, ssd_write_gbps=0.0001))
    plan = solve_plan(exposed)
    assert to_json(plan, exposed)["predicted"]["exposed_s"] == pytest.approx(
        plan.predicted["io/exposed_pct"] / 100 * plan.predicted["perf/step_s"]
    )
    assert plan.predicted["io/exposed_pct"] > 1
    plan = solve_plan(request)
    found, work, step_s = to_json(plan, request)["predicted"], work_of(plan, request), plan.predicted["perf/step_s"]
    assert set(found) == {*TIMED, *MOVED, "gpu_peak_gib", "host_peak_gib", "ssd_peak_gib", "host_gib_per_node"}
    assert found["step_s"] == step_s
    assert found["tokens_per_s_per_gpu"] == pytest.approx(2 * 4096 / step_s)
    assert found["d2h_gb"] == 2 * work.host / 1e9
    assert found["ssd_read_gb"] == 2 * work.load_ssd / 1e9
    assert work.ssd > 0
    assert found["ssd_tb_per_day"] == pytest.approx(2 * 2 * work.ssd / step_s * 86400 / 1e12)
    assert found["host_gib_per_node"] == 2 * found["host_peak_gib"]
    # 3 (L (2 T weights + 2 pairs width) + 2 T hidden vocabulary), of one rank's half of the cores.
    weights = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 512
    forward = 4 * (2 * 4096 * weights + 4 * 256 * 4096 * 4097 / 2) + 2 * 4096 * 256 * 4096
    assert found["mfu_causal_pct"] == pytest.approx(100 * 2 * 2 * 3 * forward / (step_s * 5e10))
    assert found["mfu_full_attention_pct"] > found["mfu_causal_pct"]
    again = 100 * 2 * 2 * work.rerun_flops / (step_s * 5e10)
    assert found["hfu_pct"] == pytest.approx(found["mfu_causal_pct"] + again)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5 GiB"]
