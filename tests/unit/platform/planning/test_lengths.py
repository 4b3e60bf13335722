"""A plan for each length of the rows, and tiers as large as one of them needs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.helpers.tiny_models import LLAMA
from headrace.platform.config.load import load_run_config
from headrace.platform.planning.from_config import request_from_config
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.lengths import explain_plans, plan_record, plans_to_json, slab_bytes, solve_plans
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import slab_bytes_per_node
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names

MODEL = replace(LLAMA, vocab_size=1000, hidden_size=64, num_layers=6, intermediate_size=128)
PROFILE = HardwareProfile(name="p", device_class=DeviceClass.cpu, fp32_tflops=0.05, d2h_gbps=5.0, h2d_gbps=5.0)
BUCKETS = (256, 1000, 4096)
PRESETS = [preset for preset in MemoryPreset if preset is not MemoryPreset.checkpoint]


def request(preset: MemoryPreset = MemoryPreset.auto, **values: object) -> PlanRequest:
    given = {"device_budget_bytes": 24 << 20, "host_budget_bytes": GIB, "ssd_budget_bytes": GIB, **values}
    return PlanRequest(model=MODEL, seq_len=4096, buckets=BUCKETS, profile=PROFILE, preset=preset, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS)
def test_tiers_are_as_large_as_the_longest_rows_need_them(preset: MemoryPreset) -> None:
    asked = request(preset, device_budget_bytes=24 << 20 if preset is MemoryPreset.auto else GIB)
    plans = solve_plans(asked)
    assert list(plans) == [4096, 1000, 256]
    assert [asked.of_length(length).batch_size for length in plans] == [1, 4, 16]
    wanted = {}
    for length, plan in plans.items():
        own = asked.of_length(length)
        wanted[length] = wanted_bytes(plan, own)
        assert plan.predicted[names.HOST_PEAK_GIB] == wanted[length][Medium.host] / GIB
    for tier in (Medium.host, Medium.ssd) if preset is MemoryPreset.auto else Medium:
        assert max(each[tier] for each in wanted.values()) == wanted[4096][tier], tier
    assert not asked.budgets().shortages({tier: max(each[tier] for each in wanted.values()) for tier in Medium})
    alone = replace(asked, buckets=())
    assert slab_bytes(plans, asked) == slab_bytes_per_node(solve_plans(alone)[4096], alone)


def test_token_tiles_of_more_rows_hold_as_many_tokens() -> None:
    asked = request()
    for length, batch in ((4096, 1), (1000, 4), (256, 16)):
        own = asked.of_length(length)
        assert own.cuts().token_tile * batch == asked.cuts().token_tile
        assert own.batch_size == batch


def test_plans_that_do_not_fit_together_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory holds the tier of one plan beside the device's bytes of another."""
    from headrace.platform.planning import lengths

    asked = request()
    calls: list[PlanRequest] = []
    original = lengths.find_plan

    def greedy(own: PlanRequest) -> MemoryPlan | None:
        calls.append(own)
        return None

    monkeypatch.setattr(lengths, "find_plan", greedy)
    plans = solve_plans(asked)
    assert len(calls) == 2
    longest = wanted_bytes(plans[4096], asked)
    for length in (1000, 256):
        own = asked.of_length(length)
        peaks = wanted_bytes(plans[length], own)
        assert all(peaks[tier] <= longest[tier] for tier in Medium)
    monkeypatch.setattr(lengths, "find_plan", original)


def test_every_length_is_shown_and_recorded() -> None:
    asked = request()
    plans = solve_plans(asked)
    text = explain_plans(plans, asked)
    rows = [line.split()[:2] for line in text.splitlines() if line.startswith(("4096", "1000", "256"))]
    assert rows == [["4096", "1"], ["1000", "4"], ["256", "16"]]
    assert all(len(line) <= 120 for line in text.splitlines())
    found = json.loads(json.dumps(plans_to_json(plans, asked)))["buckets"]
    assert [(row["seq_len"], row["batch_size"], row["fits"]) for row in found] == [
        (4096, 1, True),
        (1000, 4, True),
        (256, 16, True),
    ]
    shares = {4096: 0.5, 1000: 0.25, 256: 0.25}
    record = json.loads(json.dumps(plan_record(plans, asked, shares)))
    assert MemoryPlan.from_dict(record).layers == plans[4096].layers
    assert [MemoryPlan.from_dict(row["plan"]) for row in record["buckets"]] == list(plans.values())
    seconds = sum(share * plans[length].predicted[names.STEP_S] for length, share in shares.items())
    assert record["predicted"][names.STEP_S] == pytest.approx(seconds)


def test_one_length_says_what_it_said_before() -> None:
    alone = replace(request(), buckets=())
    plans = solve_plans(alone)
    assert "row tokens" not in explain_plans(plans, alone)
    assert "buckets" not in plans_to_json(plans, alone)
    assert plan_record(plans, alone, {4096: 1.0}) == plans[4096].to_dict()


def test_a_refusal_proposes_no_length_that_the_buckets_forbid() -> None:
    words = [
        "model=tiny",
        "hardware=cpu",
        "data.seq_len=4096",
        "data.buckets=256,4096",
        "tiers.device.budget_gib=0.001",
    ]
    config = load_run_config(words, environ={}).config
    assert config.data.buckets == [256, 4096]
    with pytest.raises(InputError) as caught:
        solve_plans(request_from_config(config, 512))
    assert "data.seq_len=4096:" in str(caught.value)
    assert "  data.seq_len=" not in str(caught.value)


@pytest.mark.parametrize("text", ["256,4096", "[256,4096]", "[256, 4096]", " 256 , 4096 "])
def test_lengths_are_typed_as_people_type_them(text: str) -> None:
    assert load_run_config(["model=tiny", f"data.buckets={text}"], environ={}).config.data.buckets == [256, 4096]


@pytest.mark.parametrize("text", ["256,x", "256;4096", "2.5,4096", "256,,4096"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"data\.buckets=.*: expected whole numbers separated by commas"):
        load_run_config(["model=tiny", f"data.buckets={text}"], environ={})
