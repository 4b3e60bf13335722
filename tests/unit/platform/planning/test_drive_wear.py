"""What a plan writes per day, when a rating is used up, and the plan without the SSD."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.platform.planning.drive_wear import planned_wear, solve_spare_plan, wear_lines
from headrace.platform.planning.explain import explain, to_json
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.predict import Counts, device_peak_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import solve_plan
from headrace.storage.config import EnduranceConfig, EndurancePolicy
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.config import Family, ModelConfig
from headrace.workers.telemetry import names

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
REQUEST = PlanRequest(
    model=MODEL, seq_len=4096, profile=RATED, preset=MemoryPreset.offload_ssd, micro_batches=2, ranks_per_node=2
)
RATING = EnduranceConfig(rated_tbw=600.0)
SHIFT = replace(RATING, policy=EndurancePolicy.shift)
INPUT_BYTES = 4096 * 256 * 4


def test_bytes_of_a_step_are_those_of_all_ranks_of_the_node() -> None:
    plan = solve_plan(REQUEST)
    wear = planned_wear(plan, REQUEST, RATING)
    step_bytes, step_s = 2 * 2 * 4 * INPUT_BYTES, plan.predicted[names.STEP_S]
    assert wear.step_bytes == step_bytes
    assert wear.bytes_per_day == pytest.approx(step_bytes * 86400 / step_s)
    assert wear.days == pytest.approx(600e12 / (step_bytes * 86400 / step_s))


def test_nothing_to_say_without_a_rating_or_without_the_ssd() -> None:
    assert planned_wear(solve_plan(REQUEST), REQUEST, EnduranceConfig()) is None
    kept = replace(REQUEST, preset=MemoryPreset.keep)
    assert wear_lines(solve_plan(kept), kept, RATING) == []
    assert explain(solve_plan(kept), kept, endurance=RATING) == explain(solve_plan(kept), kept)


def test_the_table_says_when_the_drive_lasts_too_short() -> None:
    plan = solve_plan(REQUEST)
    days = planned_wear(plan, REQUEST, RATING).days
    fine, short = (replace(RATING, lifetime_years=days / 365 * share) for share in (0.99, 1.01))
    text = explain(plan, REQUEST, endurance=fine)
    assert f"rated_tbw=600 is used up after {days:.3g} days" in text
    assert "SSD wear per node: 0.06711 GB a step" in text
    assert "warning" not in text
    text = explain(plan, REQUEST, endurance=short)
    assert "  warning: less than the" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_predicted_step_the_rating_is_counted_in_steps() -> None:
    request = replace(REQUEST, profile=CPU)
    plan = solve_plan(request)
    (line,) = wear_lines(plan, request, RATING)
    assert f"is used up after {600e12 / (16 * INPUT_BYTES):.4g} steps" in line
    assert to_json(plan, request, endurance=RATING)["ssd_wear"]["days"] is None


def test_json_form() -> None:
    plan = solve_plan(REQUEST)
    data = json.loads(json.dumps(to_json(plan, REQUEST, endurance=RATING, spare=plan)))
    assert data["ssd_wear"]["bytes_per_step"] == 16 * INPUT_BYTES
    assert data["ssd_wear"]["rated_bytes"] == 600e12
    assert data["spare_plan"] == plan.to_dict()
    assert to_json(plan, REQUEST)["ssd_wear"] is None


def test_the_spare_plan_is_the_best_one_without_the_ssd() -> None:
    """Whatever was asked for: nothing else would be possible for offload_ssd."""
    tight = replace(REQUEST, device_budget_bytes=solve_tight(REQUEST), host_budget_bytes=2 * INPUT_BYTES)
    plan = solve_plan(tight)
    spare = solve_spare_plan(plan, tight, SHIFT)
    assert spare == solve_plan(replace(tight, preset=MemoryPreset.auto, ssd_budget_bytes=0))
    counts = Counts.of(spare.layers)
    assert counts.ssd == 0
    assert counts.host > 0
    assert "when the SSD's write budget is used up (policy=shift): " in explain(plan, tight, spare=spare)


def test_no_spare_plan_where_nobody_would_go_over_to_it() -> None:
    assert solve_spare_plan(solve_plan(REQUEST), REQUEST, RATING) is None
    kept = replace(REQUEST, preset=MemoryPreset.keep)
    assert solve_spare_plan(solve_plan(kept), kept, SHIFT) is None


def test_a_run_that_could_not_go_on_is_refused_with_changes_that_help() -> None:
    tight = replace(REQUEST, device_budget_bytes=solve_tight(REQUEST), host_budget_bytes=0)
    with pytest.raises(InputError, match=r"endurance\.policy=shift: there is nothing to shift to") as caught:
        solve_spare_plan(solve_plan(tight), tight, SHIFT)
    said = [line.strip() for line in str(caught.value).splitlines()]
    assert any(line.startswith("device: ") and f"{tight.device_budget_bytes} there" in line for line in said)
    assert "tiers.ssd.endurance.policy=warn" in said
    proposals = dict(line.split("=") for line in said if line.startswith("tiers.") and "budget_gib=" in line)
    assert set(proposals) == {"tiers.device.budget_gib", "tiers.host.budget_gib"}
    host = int(float(proposals["tiers.host.budget_gib"]) * 2**30 / 2)
    device = int(float(proposals["tiers.device.budget_gib"]) * 2**30)
    for changed in (replace(tight, host_budget_bytes=host), replace(tight, device_budget_bytes=device)):
        assert solve_spare_plan(solve_plan(changed), changed, SHIFT) is not None


def test_what_the_machine_does_not_have_is_not_proposed() -> None:
    small = replace(RATED, host_gib=0.001, device_memory_gib=1.0)
    tight = replace(REQUEST, profile=small, device_budget_bytes=solve_tight(REQUEST), host_budget_bytes=0)
    with pytest.raises(InputError) as caught:
        solve_spare_plan(solve_plan(tight), tight, SHIFT)
    assert "tiers.host.budget_gib=" not in str(caught.value)


def solve_tight(request: PlanRequest) -> int:
    """Bytes of the device that just hold a plan with every input away."""
    plan = solve_plan(request)
    return device_peak_bytes(plan.layers, plan.prefetch_layers, request.cost())
