"""Whether a request of auto fits at all: the plan by layer with the lowest peaks, or a plan by chunk. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

from headrace.platform.planning import priced
from headrace.platform.planning.chunks import lean_chunks_wanted
from headrace.platform.planning.columns import Column
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.problem import Problem
from headrace.platform.planning.rank_peak import solver_cost
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.unlike import nearest_bytes
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan, Residence, input_layer

PLACES = (Residence.hbm, Residence.host, Residence.ssd)


def leanest(request: PlanRequest) -> PlanRequest:
    """The request with the cuts of those that its plan may have that need the least."""
    return request.with_cuts(request.cut_choices[-1])


def lean_problem(request: PlanRequest) -> Problem:
    """The request with the leanest treatment alone: a block's input waits somewhere, all else is computed again."""
    skeleton, shape = request.skeleton(), request.shape()
    plans = [input_layer(skeleton, place) for place in PLACES]
    found = tuple(Column(plan, shape.cost(plan)) for plan in plans)
    return Problem(found, solver_cost(request), request.budgets(), request.rates(), request.prefetch_layers)


def lean_wanted(request: PlanRequest) -> dict[Medium, int]:
    """Peaks to judge plans by layer by: those that fit if any do.

    The SSD takes all it has room for, which spares device and memory. Of host memory they take the least with which the
    device has room: without an accelerator both are the same memory.
    """
    if request.is_mixed:
        return nearest_bytes(request)
    problem, slot = lean_problem(request), lean_slot_bytes(request)
    where = {next(iter(column.plan.stretches.values()))[0].residence: c for c, column in enumerate(problem.columns)}
    budgets, others = request.budgets(), request.model.num_layers - 1
    ssd = _room(budgets[Medium.ssd], slot, others)
    most, device = _room(budgets[Medium.host], slot, others - ssd), budgets[Medium.hbm]

    def wanted(host: int) -> Mapping[Medium, int]:
        counts = {Residence.hbm: others - ssd - host, Residence.host: host, Residence.ssd: ssd}
        by_column = {where[place]: number for place, number in counts.items()}
        return problem.wanted(problem.arranged(by_column, where[Residence.hbm]))

    def has_room(host: int) -> bool:
        return device is None or wanted(host)[Medium.hbm] <= device

    return dict(wanted(min(bisect_left(range(most + 1), True, key=has_room), most)))


def lean_slot_bytes(request: PlanRequest) -> int:
    """What the inputs of a block take in a slab, of the block with the largest ones."""
    kinds = {skeleton: layer for layer, skeleton in enumerate(request.skeletons())}
    return max(
        request.shape(layer=layer).cost(input_layer(skeleton, Residence.host)).host_slots
        for skeleton, layer in kinds.items()
    )


def lean_fits(request: PlanRequest) -> bool:
    """Whether the plan by layer with the lowest peaks holds every budget."""
    return not request.budgets().shortages(lean_wanted(request))


def _by_chunk(request: PlanRequest) -> PlanRequest:
    return replace(request, preset=MemoryPreset.chunk_auto, head_groups=None)


def chunk_plan(request: PlanRequest) -> MemoryPlan | None:
    """The plan of the sweep by chunk that auto may choose, that of memory=chunk_auto; None where it does not fit."""
    if not request.may_run_by_chunk:
        return None
    own = _by_chunk(request)
    plan = asked_plan(own)
    return None if own.budgets().shortages(priced.wanted_bytes(plan, own)) else plan


def auto_wanted(request: PlanRequest) -> dict[Medium, int]:
    """Peaks to judge a request of auto by: by layer, or by chunk where that is nearer to the budgets."""
    by_layer, excess = lean_wanted(leanest(request)), request.budgets().excess
    if not request.may_run_by_chunk or not excess(by_layer):
        return by_layer
    return min(by_layer, lean_chunks_wanted(_by_chunk(request)), key=excess)


def _room(budget_bytes: int | None, slot_bytes: int, most: int) -> int:
    return most if budget_bytes is None else min(most, budget_bytes // slot_bytes)
