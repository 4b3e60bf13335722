"""Attention in head groups: the planner takes them where the budget needs them, and a refusal proposes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.helpers.planning import FOUR_KEYS
from headrace.platform.planning import priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.cost import attention_workspace_bytes
from headrace.platform.planning.explain import explain
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Sweep, check_plan
from headrace.workers.model.skeleton import chunk_skeleton

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)

HOST = PlanRequest(model=FOUR_KEYS, seq_len=16384, profile=CPU, preset=MemoryPreset.offload_host, ssd_budget_bytes=0)


def peak(head_groups: int, request: PlanRequest = HOST) -> int:
    request = replace(request, head_groups=head_groups)
    return priced.wanted_bytes(asked_plan(request), request)[Medium.hbm]


def test_the_peak_falls_with_the_groups() -> None:
    assert peak(4) < 0.9 * peak(2) < 0.8 * peak(1)


def test_auto_takes_as_few_groups_as_fit() -> None:
    auto = replace(HOST, preset=MemoryPreset.auto)
    for head_groups in (1, 2, 4):
        request = replace(auto, device_budget_bytes=peak(head_groups))
        plan = solve_plan(request)
        assert plan.cuts.head_groups == head_groups
        check_plan(plan, [HOST.skeleton()] * FOUR_KEYS.num_layers)
        text = explain(plan, request)
        assert (f"{head_groups} groups of KV heads" in text) == (head_groups > 1)
        assert ":" not in "".join(line.split(": ")[-1] for line in text.splitlines() if line.startswith("0"))


def test_a_refusal_proposes_them() -> None:
    request = replace(HOST, device_budget_bytes=peak(2))
    with pytest.raises(InputError, match=r"\n  memory\.head_groups=2"):
        solve_plan(request)
    assert solve_plan(replace(request, head_groups=2)).cuts.head_groups == 2


def test_auto_without_head_groups_runs_by_chunk() -> None:
    request = replace(HOST, preset=MemoryPreset.auto, head_groups=1, device_budget_bytes=peak(2))
    plan = solve_plan(request)
    assert (plan.name, plan.sweep) == ("auto", Sweep.by_chunk)
    check_plan(plan, [chunk_skeleton(HOST.skeleton())] * FOUR_KEYS.num_layers)
    assert not request.budgets().shortages(priced.wanted_bytes(plan, request))
    assert "KV blocks of" in explain(plan, request)


@pytest.mark.parametrize("head_groups", [0, 3, 8])
def test_a_number_that_does_not_divide_the_heads_is_refused(head_groups: int) -> None:
    with pytest.raises(
        InputError, match=f"memory.head_groups={head_groups}: the model has 4 KV heads; choose of 1, 2, 4"
    ):
        replace(HOST, head_groups=head_groups)


def test_by_chunk_there_are_none() -> None:
    with pytest.raises(InputError, match=r"memory\.head_groups=2: memory=chunk_host runs by chunk"):
        replace(HOST, preset=MemoryPreset.chunk_host, head_groups=2)


def test_the_workspace_of_attention_is_one_group_s() -> None:
    whole, half = (
        attention_workspace_bytes(FOUR_KEYS, 1024, 2, degree=1, head_groups=groups, deterministic=False)
        for groups in (1, 2)
    )
    assert half == whole // 2
