"""Chooses the residence of every tensor of every layer: the shortest predicted step that every budget holds. No torch.

The treatments of a layer are generated from the skeleton (columns.py); a mixed-integer linear program says how many
layers are treated each way (milp.py); a greedy search is its baseline and its fallback (greedy.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from itertools import product
from operator import itemgetter
from typing import NamedTuple

from headrace.platform.planning import priced
from headrace.platform.planning.columns import Column, columns
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.greedy import greedy
from headrace.platform.planning.leanest import chunk_plan, lean_fits
from headrace.platform.planning.predict import Rates, Work, block_seconds, missing_rates, step_seconds
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.problem import GAP, Layers, Problem
from headrace.platform.planning.rank_peak import solver_cost
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.unlike import fastest_preset
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, Sweep
from headrace.workers.telemetry import names

# Of a pipeline's rank, each with prices that are right for the plan before.
MOST_SOLUTIONS = 4
TIER_OF = {Medium.hbm: "device", Medium.host: "host", Medium.ssd: "ssd", None: "memory"}
# Of the presets by layer, those with the cuts of auto: their layers are among the treatments that auto chooses from.
PUBLISHED = (MemoryPreset.memo, MemoryPreset.ssdtrain)


def find_plan(request: PlanRequest) -> MemoryPlan | None:
    """The plan of a request, with what it is predicted to cost; None where none of the asked preset fits.

    More head groups than one make the projections of q, k and v run again, so they are taken only where they must be.
    """
    if request.preset is MemoryPreset.auto:
        plan = _auto_plan(request)
    else:
        asked = asked_plan(request)
        plan = None if request.budgets().shortages(priced.wanted_bytes(asked, request)) else asked
    return None if plan is None else replace(plan, predicted=predict(plan, request))


def _auto_plan(request: PlanRequest) -> MemoryPlan | None:
    """The faster one of the best plan by layer and of that by chunk, if the seconds of both are known."""
    if request.is_mixed:
        return fastest_preset(request)
    by_layer = None if request.sweep is Sweep.by_chunk else _layer_plan(request)
    by_chunk = chunk_plan(request)
    if by_chunk is None:
        return by_layer
    own = replace(by_chunk, name="auto", solver=Solver.chunks.value)
    if by_layer is None:
        return own
    rates = request.rates()
    if any(missing_rates(priced.work_of(plan, request), rates) for plan in (by_layer, own)):
        return by_layer
    layer_s, chunk_s = (priced.seconds(plan, request).total for plan in (by_layer, own))
    wear = request.ssd_wear_bytes_per_s
    wears_out = wear is not None and priced.work_of(own, request).ssd > wear * chunk_s
    return own if chunk_s < (1 - GAP) * layer_s and not wears_out else by_layer


def _layer_plan(request: PlanRequest) -> MemoryPlan | None:
    for cuts in request.cut_choices:
        own = request.with_cuts(cuts)
        if own.passes is None and not lean_fits(own):
            continue
        plan = _solved(own) or _solved(replace(own, ssd_wear_bytes_per_s=None))
        if plan is not None:
            return plan
    return None


def problem_of(request: PlanRequest) -> Problem:
    """What the solver is asked for a request with a number of head groups."""
    budgets, shape = request.budgets(), request.shape()
    tiers = [tier for tier in (Medium.host, Medium.ssd) if budgets[tier] != 0]
    places = [Residence.hbm, *(Residence(tier.value) for tier in tiers)]
    published = (layer for preset in PUBLISHED for layer in asked_plan(replace(request, preset=preset)).layers)
    more = [layer for layer in dict.fromkeys(published) if all(_is_in(layer, tier, tiers) for tier in Medium)]
    found = columns(shape, places, more)
    wear = request.ssd_wear_bytes_per_s
    return Problem(found, solver_cost(request), budgets, request.rates(), request.prefetch_layers, wear)


def _is_in(layer: LayerPlan, tier: Medium, tiers: Sequence[Medium]) -> bool:
    """Whether a layer plan does without a tier, or has it."""
    used = {stretch.residence.medium for row in layer.stretches.values() for stretch in row}
    return tier not in used or tier in tiers


def _solved(request: PlanRequest) -> MemoryPlan | None:
    """In a pipeline, where the problem's prices are not exact (solver_cost), the best of those whose own peak fits."""
    problem, device = problem_of(request), request.budgets()[Medium.hbm]
    fitting: list[tuple[tuple[float, ...], MemoryPlan]] = []
    for _ in range(MOST_SOLUTIONS):
        found = solve(problem)
        if found is None:
            break
        rows = tuple(problem.columns[number].plan for number in found.layers)
        plan = MemoryPlan(
            "auto", rows, cuts=request.cuts(), prefetch_layers=request.prefetch_layers, solver=found.solver.value
        )
        if request.passes is None or device is None:
            return plan
        peak = priced.wanted_bytes(plan, request)[Medium.hbm]
        gap = peak - problem.wanted(found.layers)[Medium.hbm]
        if peak <= device:
            fitting.append((problem.rank(found.layers), plan))
        if gap == 0 or problem.is_fastest(found.layers):
            break
        problem = replace(problem, cost=replace(problem.cost, fixed_bytes=problem.cost.fixed_bytes + gap))
    if fitting:
        return min(fitting, key=itemgetter(0))[1]
    return None if request.passes is None else fastest_preset(request)


class Solver(StrEnum):
    """What a plan was found by."""

    milp = "milp"
    milp_in_time = "milp, best within its time"
    greedy = "greedy"
    greedy_is_best = "greedy, nothing to gain"
    chunks = "rule of memory=chunk_auto"


class Found(NamedTuple):
    """The treatments of the layers, and what found them."""

    layers: Layers
    solver: Solver


def solve(problem: Problem) -> Found | None:
    """The plan of the shortest step that every budget holds, within the gap of solve_milp; None where nothing fits.

    Where HiGHS does not finish in time, the better of its plan and of the greedy one. Of plans with equal steps one
    that moves fewer bytes is taken where a change of one treatment leads to it.
    """
    start = greedy(problem)
    if start is not None and problem.is_fastest(start):
        return Found(start, Solver.greedy_is_best)
    # Most of a second of imports, which a refused plan does not need.
    from headrace.platform.planning.milp import solve_milp

    solution = solve_milp(problem, start)
    found = [start, solution.layers]
    judged = [(problem.rank(layers), layers) for layers in found if layers is not None and not problem.excess(layers)]
    if not judged:
        return None
    rank, layers = min(judged)
    polished = greedy(problem, layers) or layers
    if solution.is_proven:
        return Found(polished, Solver.milp)
    return Found(polished, Solver.greedy if start is not None and rank == problem.rank(start) else Solver.milp_in_time)


class Change(NamedTuple):
    """One layer of a plan treated in another way.

    Args:
        gain_s: by which a micro-batch is shorter.
        over: what the plan would not fit into: see Budgets.shortages; empty where it fits.
    """

    gain_s: float
    over: list[tuple[Medium | None, int, int]]


def faster_changes(plan: MemoryPlan, request: PlanRequest) -> list[Change]:
    """The changes of one layer that would make a plan of auto faster, and that at most one tier is too small for.

    Where no rate is known, those with fewer FLOPs to compute again.
    """
    if plan.solver == "" or plan.sweep is not Sweep.by_layer or request.is_mixed:
        return []
    own = request.with_cuts(plan.cuts)
    problem = problem_of(own)
    # A plan that was made for other budgets has treatments of its own.
    known = {column.plan for column in problem.found}
    strange = [layer for layer in dict.fromkeys(plan.layers) if layer not in known]
    extra = tuple(Column(layer, own.shape().cost(layer)) for layer in strange)
    problem = replace(problem, found=(*problem.found, *extra))
    number = {column.plan: c for c, column in enumerate(problem.columns)}
    *others, top = (number[layer] for layer in plan.layers)
    counts, now = Counter(others), problem.rank((*others, top))
    found = []
    for source, target in product(counts, range(len(problem.columns))):
        layers = problem.arranged(counts - Counter([source]) + Counter([target]), top)
        rank = problem.rank(layers)
        over = problem.budgets.shortages(problem.wanted(layers))
        if rank[:3] < now[:3] and len(over) < 2:
            found.append(Change((now[1] - rank[1]) * problem.tick_s, over))
    return found


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
    values |= {name: num_bytes / GIB for name, num_bytes in sent_bytes(plan, request).items()}
    values |= transfer_gbps(work, rates)
    if not missing_rates(work, rates):
        seconds = step_seconds(work, plan.prefetch_layers, cost, rates)
        values[names.STEP_S] = seconds.total * request.micro_batches
        values[names.EXPOSED_PCT] = 100 * seconds.exposed / seconds.total
        if plan.sweep is Sweep.by_layer:
            of_blocks = block_seconds(work, plan.prefetch_layers, cost, rates)
            values[names.FORWARD_S], values[names.BACKWARD_S] = (request.micro_batches * each for each in of_blocks)
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
