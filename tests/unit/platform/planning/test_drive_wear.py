"""What a plan writes per day, and when a rating is used up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.helpers.planning import FOUR_KEYS, TINY
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.drive_wear import planned_wear, wear_lines, without_spent_drive
from headrace.platform.planning.explain import explain, to_json
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.endurance import StripedWear
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.telemetry import names

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)
RATED = replace(CPU, fp32_tflops=0.05, d2h_gbps=5.0, h2d_gbps=5.0, ssd_write_gbps=0.5, ssd_read_gbps=0.5)

MIB = 1 << 20
REQUEST = PlanRequest(
    model=TINY, seq_len=4096, profile=RATED, preset=MemoryPreset.offload_ssd, micro_batches=2, ranks_per_node=2
)
RATING = EnduranceConfig(rated_tbw=600.0)
INPUT_BYTES = 4096 * 256 * 4


def test_bytes_of_a_step_are_those_of_all_ranks_of_the_node() -> None:
    plan = solve_plan(REQUEST)
    wear = planned_wear(plan, REQUEST, RATING)
    step_bytes, step_s = 2 * 2 * 3 * INPUT_BYTES, plan.predicted[names.STEP_S]
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
    assert "SSD wear per node: 0.05033 GB a step" in text
    assert "warning" not in text
    text = explain(plan, REQUEST, endurance=short)
    assert "  warning: less than the" in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_a_predicted_step_the_rating_is_counted_in_steps() -> None:
    request = replace(REQUEST, profile=CPU)
    plan = solve_plan(request)
    (line,) = wear_lines(plan, request, RATING)
    assert f"is used up after {600e12 / (12 * INPUT_BYTES):.4g} steps" in line
    assert to_json(plan, request, endurance=RATING)["ssd_wear"]["days"] is None


def test_json_form() -> None:
    plan = solve_plan(REQUEST)
    data = json.loads(json.dumps(to_json(plan, REQUEST, endurance=RATING)))
    assert data["ssd_wear"]["bytes_per_step"] == 12 * INPUT_BYTES
    assert data["ssd_wear"]["rated_bytes"] == 600e12
    assert to_json(plan, REQUEST)["ssd_wear"] is None


@pytest.mark.parametrize(("least_gib", "fits"), [(0.25, True), (0.18, False)])
def test_a_run_on_a_spent_drive_leaves_it_alone_if_it_can(
    least_gib: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rated = EnduranceConfig(rated_tbw=1e5)
    request = PlanRequest(
        model=replace(FOUR_KEYS, num_layers=6),
        seq_len=1024,
        batch_size=16,
        profile=HardwareProfile(name="cpu", device_class=DeviceClass.cpu),
        device_budget_bytes=int(least_gib * 2**30),
        host_budget_bytes=0,
        ssd_budget_bytes=2**30,
    )
    assert without_spent_drive(request, rated, [tmp_path]) == (request, None)
    StripedWear([tmp_path]).add(int(1e17))
    own, warning = without_spent_drive(request, rated, [tmp_path])
    assert own == (replace(request, ssd_budget_bytes=0) if fits else request)
    assert warning is not None
    assert ("leaves it alone" in warning) is fits
    assert "rated_tbw=100000" in warning
    assert without_spent_drive(request, EnduranceConfig(), [tmp_path]) == (request, None)
    chosen = replace(request, preset=MemoryPreset.offload_ssd)
    assert without_spent_drive(chosen, rated, [tmp_path]) == (chosen, None)
