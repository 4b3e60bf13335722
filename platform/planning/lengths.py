"""Rows of several lengths: a plan for each, the tiers that hold all of them, and what people and records see. No torch.

One micro-batch is at work at a time, so every plan may use the whole budgets. The tiers are opened once, as large as
the plan that fills them most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import explain, size, to_json
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan, slab_bytes_per_node
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import WHOLE_RECOMPUTE, LayerPlan, MemoryPlan, Residence
from headrace.workers.model.skeleton import Skeleton
from headrace.workers.telemetry import names
from headrace.workers.train.predicted import mixed

Plans = Mapping[int, MemoryPlan]


def solve_plans(request: PlanRequest) -> dict[int, MemoryPlan]:
    """The plan of every length of the rows, the longest first.

    Without an accelerator host memory holds the tiers, as large as one plan needs them, beside the device's bytes of
    another plan. Where they do not fit together, the plan of the shorter rows gets no more than the longer rows use.

    Raises:
        InputError: as solve_plan.
    """
    plans = {request.seq_len: solve_plan(request)}
    peaks = _peaks(plans[request.seq_len], request)
    for length in reversed(request.buckets[:-1]):
        own = request.of_length(length)
        plan = find_plan(own)
        if plan is None or request.budgets().shortages(_larger(peaks, _peaks(plan, own))):
            own = replace(
                own,
                device_budget_bytes=peaks[Medium.hbm],
                host_budget_bytes=peaks[Medium.host],
                ssd_budget_bytes=peaks[Medium.ssd],
            )
            plan = solve_plan(own)
        plans[length] = plan
        peaks = _larger(peaks, _peaks(plan, own))
    return plans


def slab_bytes(plans: Plans, request: PlanRequest) -> dict[Medium, int]:
    """The size of the slabs of one node to open."""
    found = slab_bytes_per_node(plans[request.seq_len], request)
    for length, plan in plans.items():
        found = _larger(found, slab_bytes_per_node(plan, request.of_length(length)))
    return found


def explain_plans(plans: Plans, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> str:
    """The plan of the longest rows as explain says it, and a line for each length."""
    text = explain(plans[request.seq_len], request, endurance=endurance)
    return text if len(plans) == 1 else "\n".join((text, "", *_length_lines(plans, request)))


def plans_to_json(plans: Plans, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> dict[str, Any]:
    """What to_json says of the longest rows; where there are several lengths, `buckets` has the same of each."""
    found = to_json(plans[request.seq_len], request, endurance=endurance)
    if len(plans) > 1:
        requests = {length: request.of_length(length) for length in plans}
        found["buckets"] = [
            {"seq_len": length, "batch_size": own.batch_size, **to_json(plans[length], own, endurance=endurance)}
            for length, own in requests.items()
        ]
    return found


def plan_record(plans: Plans, request: PlanRequest, shares: Mapping[int, float]) -> dict[str, Any]:
    """The content of plan.json: the plan of the longest rows and, with several lengths, that of each as `buckets`.

    Args:
        shares: of every length among the micro-batches of the run; `predicted` is then of a mean step.
    """
    record = plans[request.seq_len].to_dict()
    if len(plans) == 1:
        return record
    return record | {
        "predicted": mixed({length: plan.predicted for length, plan in plans.items()}, shares),
        "buckets": [
            {"seq_len": length, "batch_size": request.of_length(length).batch_size, "share": shares[length]}
            | {"plan": plan.to_dict()}
            for length, plan in plans.items()
        ],
    }


def _length_lines(plans: Plans, request: PlanRequest) -> list[str]:
    lines = ["row tokens  rows  device peak   host tier     SSD tier      step        blocks"]
    for length, plan in plans.items():
        own, seconds = request.of_length(length), plan.predicted.get(names.STEP_S)
        peaks = "".join(f"{size(num_bytes):<14}" for num_bytes in _peaks(plan, own).values())
        step = "unknown" if seconds is None else f"{seconds:.3g} s"
        blocks = ", ".join(
            f"{number} {word}" for word, number in Counter(map(_short, plan.layers, own.skeletons())).items()
        )
        lines.append(f"{length:<11} {own.batch_size:<5} {peaks}{step:<11} {blocks}"[:120])
    return [*lines, "rows: of a micro-batch on one rank; step: one with micro-batches of this length only"]


def _short(layer: LayerPlan, skeleton: Skeleton) -> str:
    """The places of a block's tensors in a few words."""
    rows = (layer.stretches.get(name, (WHOLE_RECOMPUTE,)) for name in skeleton.skeletal)
    found = {stretch.residence for row in rows for stretch in row}
    return "+".join("device" if place is Residence.hbm else place.value for place in Residence if place in found)


def _peaks(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    return wanted_bytes(plan, request)


def _larger(one: Mapping[Medium, int], other: Mapping[Medium, int]) -> dict[Medium, int]:
    return {tier: max(num_bytes, other[tier]) for tier, num_bytes in one.items()}
