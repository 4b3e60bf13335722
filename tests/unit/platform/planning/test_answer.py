"""A run that is resumed keeps the cuts of its plan, whatever the machine's rates are now."""

from __future__ import annotations

from dataclasses import replace

from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.planning import priced
from headrace.platform.planning.answer import resumed, solve_plan
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Sweep

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)

REQUEST = PlanRequest(model=FOUR_KEYS, seq_len=16384, profile=CPU, ssd_budget_bytes=0)


def peak(head_groups: int) -> int:
    own = replace(REQUEST, preset=MemoryPreset.offload_host, head_groups=head_groups)
    return priced.wanted_bytes(asked_plan(own), own)[Medium.hbm]


def test_head_groups_stay() -> None:
    before = solve_plan(replace(REQUEST, device_budget_bytes=peak(2)))
    assert (before.sweep, before.cuts.head_groups) == (Sweep.by_layer, 2)
    own, warning = resumed(REQUEST, before.to_dict())
    assert warning is None
    assert solve_plan(own).cuts == before.cuts
    assert solve_plan(REQUEST).cuts != before.cuts


def test_the_sweep_by_chunk_stays() -> None:
    before = solve_plan(replace(REQUEST, device_budget_bytes=peak(4) // 2))
    assert before.sweep is Sweep.by_chunk
    own, warning = resumed(REQUEST, before.to_dict())
    assert warning is None
    after = solve_plan(own)
    assert (after.sweep, after.cuts) == (Sweep.by_chunk, before.cuts)


def test_what_cannot_be_kept_is_said() -> None:
    before = solve_plan(replace(REQUEST, device_budget_bytes=peak(1)))
    small = replace(REQUEST, device_budget_bytes=peak(2))
    own, warning = resumed(small, before.to_dict())
    assert own == small
    assert warning is not None
    assert "do not fit any more" in warning
    for damaged in ({}, {"schema_version": 3}, {**before.to_dict(), "layers": 5}):
        own, warning = resumed(small, damaged)
        assert own == small
        assert warning is not None
        assert "plan.json" in warning


def test_a_preset_has_its_own_cuts() -> None:
    keep = replace(REQUEST, preset=MemoryPreset.keep)
    assert resumed(keep, solve_plan(keep).to_dict()) == (keep, None)
