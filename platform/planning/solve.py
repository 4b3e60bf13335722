"""Chooses the residence of every layer: the plan with the shortest predicted step that every budget holds. No torch.

All blocks are alike, so a plan's seconds and its slab bytes depend only on how many blocks are treated each way, and of
all orders the one that sends the inputs of the first blocks away, recomputes the next and keeps the last has the lowest
device peak: the bytes that stay are never there before they must be, and the backward pass of the last blocks starts at
once. So the search over counts is exact (tests compare it with every assignment of small models).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from headrace.platform.planning import priced
from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.cost import layer_plan
from headrace.platform.planning.predict import (
    BlockCost,
    Counts,
    Rates,
    StepCost,
    Treatment,
    Work,
    device_peak_bytes,
    missing_rates,
    step_seconds,
    tier_bytes,
)
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names

TIER_OF = {Medium.hbm: "device", Medium.host: "host", Medium.ssd: "ssd", None: "memory"}


def find_plan(request: PlanRequest) -> MemoryPlan | None:
    """The plan of a request, with what it is predicted to cost; None where none of the asked preset fits.

    More head groups than one make the projections of q, k and v run again, so they are taken only where they must be.
    """
    for number in request.head_group_choices:
        plan = _find_plan(request.with_groups(number))
        if plan is not None:
            return plan
    return None


def _find_plan(request: PlanRequest) -> MemoryPlan | None:
    cost, budgets, rates = request.cost(), request.budgets(), request.rates()
    if request.preset is MemoryPreset.auto:
        counts = best_counts(cost, budgets, rates, request.prefetch_layers)
        plan = None if counts is None else auto_plan(arrange(counts), request)
    else:
        plan = asked_plan(request)
        plan = None if budgets.shortages(priced.wanted_bytes(plan, request)) else plan
    return None if plan is None else replace(plan, predicted=predict(plan, request))


def auto_plan(layers: Sequence[Treatment], request: PlanRequest) -> MemoryPlan:
    """The plan that treats its blocks so."""
    rows = tuple(layer_plan(treatment, request.skeleton()) for treatment in layers)
    return MemoryPlan("auto", rows, cuts=request.cuts(), prefetch_layers=request.prefetch_layers)


def arrange(counts: Counts) -> tuple[Treatment, ...]:
    """Layers in the order of the lowest device peak; SSD and host take turns, so that both links work all the time."""
    away = [
        Treatment.ssd if (i + 1) * counts.ssd // counts.away > i * counts.ssd // counts.away else Treatment.host
        for i in range(counts.away)
    ]
    return (*away, *(Treatment.recompute,) * counts.recompute, *(Treatment.keep,) * counts.keep)


def overflow(
    blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost, budgets: Budgets
) -> list[tuple[Medium | None, int, int]]:
    """What the blocks do not fit into: see Budgets.shortages."""
    return budgets.shortages(wanted_bytes(blocks, prefetch_layers, cost))


def wanted_bytes(blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost) -> dict[Medium, int]:
    """Peak of every tier."""
    return {Medium.hbm: device_peak_bytes(blocks, prefetch_layers, cost), **tier_bytes(blocks)}


def best_counts(cost: StepCost, budgets: Budgets, rates: Rates, prefetch_layers: int) -> Counts | None:
    """Counts of the best plan that every budget holds, None where none does.

    Best is the shortest step; among equals the fewest bytes moved, SSD bytes counted first. Where the SSD's rates are
    unknown it is used only as far as it must be: seconds that cannot be predicted are not traded for.
    """
    best: tuple[tuple[float, ...], Counts] | None = None
    room = {tier: _slots(budgets[tier], cost) for tier in (Medium.host, Medium.ssd)}
    knows_all = not missing_rates(Work(0.0, host=1, ssd=1, load_host=1, load_ssd=1), rates)
    for keep in range(cost.num_layers, -1, -1):
        if best is not None and knows_all:
            floor = Work.of_counts(Counts(keep, cost.num_layers - keep, 0, 0), prefetch_layers, cost)
            if best[0][1] <= step_seconds(floor, prefetch_layers, cost, rates).total:
                break
        for counts in _splits(keep, cost, room, budgets, prefetch_layers):
            order = rank(Work.of_counts(counts, prefetch_layers, cost), prefetch_layers, cost, rates)
            if best is None or order < best[0]:
                best = (order, counts)
    return None if best is None else best[1]


def rank(work: Work, prefetch_layers: int, cost: StepCost, rates: Rates) -> tuple[float, ...]:
    """What best_counts minimises, most important first: unpredictable bytes, seconds, then FLOPs and bytes."""
    ssd_is_known = not missing_rates(Work(0.0, ssd=1, load_ssd=1), rates)
    seconds = step_seconds(work, prefetch_layers, cost, rates).total
    return (0 if ssd_is_known else work.ssd, seconds, work.rerun_flops, work.ssd, work.host)


def predict(plan: MemoryPlan, request: PlanRequest) -> dict[str, float]:
    """What the run will compare with what it measured, by metric name; seconds only where every rate is known."""
    cost, rates, work = request.cost(), request.rates(), priced.work_of(plan, request)
    wanted = priced.wanted_bytes(plan, request)
    scale = request.micro_batches / GIB
    values: dict[str, float] = {
        names.GPU_PEAK_GIB: wanted[Medium.hbm] / GIB,
        names.HOST_PEAK_GIB: wanted[Medium.host] / GIB,
        names.SSD_PEAK_GIB: wanted[Medium.ssd] / GIB,
        names.HOST_STORED_GIB: scale * work.host,
        names.HOST_LOADED_GIB: scale * work.load_host,
        names.SSD_STORED_GIB: scale * work.ssd,
        names.SSD_LOADED_GIB: scale * work.load_ssd,
    }
    values |= transfer_gbps(work, rates)
    if not missing_rates(work, rates):
        seconds = step_seconds(work, plan.prefetch_layers, cost, rates)
        values[names.STEP_S] = seconds.total * request.micro_batches
        values[names.EXPOSED_PCT] = 100 * seconds.exposed / seconds.total
    return values


def transfer_gbps(work: Work, rates: Rates) -> dict[str, float]:
    """GB/s while moving, of the links that the plan uses, where known; a drive is no faster than its link."""
    write, read = (
        None if drive is None else drive if link is None else min(drive, link)
        for drive, link in ((rates.ssd_write, rates.d2h), (rates.ssd_read, rates.h2d))
    )
    used = {
        names.D2H_GBPS: rates.d2h if work.host else None,
        names.H2D_GBPS: rates.h2d if work.load_host else None,
        names.SSD_WRITE_GBPS: write if work.ssd else None,
        names.SSD_READ_GBPS: read if work.load_ssd else None,
    }
    return {name: rate / 1e9 for name, rate in used.items() if rate is not None}


def slab_bytes_per_node(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    """What the plan fills of each tier on one node: the size of the slabs to open. Never above the budgets."""
    wanted = priced.wanted_bytes(plan, request)
    return {tier: request.ranks_per_node * wanted[tier] for tier in (Medium.host, Medium.ssd)}


def _slots(budget_bytes: int | None, cost: StepCost) -> int:
    return cost.num_layers if budget_bytes is None else min(cost.num_layers, budget_bytes // cost.slot_bytes)


def _splits(
    keep: int, cost: StepCost, room: dict[Medium, int], budgets: Budgets, prefetch_layers: int
) -> Iterator[Counts]:
    others = cost.num_layers - keep
    for away in range(min(others, room[Medium.host] + room[Medium.ssd]) + 1):
        # The device does not see which tier an input goes to.
        peak = device_peak_bytes(cost.of(arrange(Counts(keep, others - away, away, 0))), prefetch_layers, cost)
        if (device := budgets[Medium.hbm]) is not None and peak > device:
            continue
        most_on_host = min(room[Medium.host], budgets.host_room(peak) // cost.slot_bytes)
        for ssd in range(max(0, away - most_on_host), min(away, room[Medium.ssd]) + 1):
            yield Counts(keep, others - away, away - ssd, ssd)
