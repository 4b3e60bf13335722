"""What any plan costs: bytes of every tier, and work beside the model's own. No torch."""

from __future__ import annotations

from headrace.platform.planning import chunks
from headrace.platform.planning.predict import Seconds, Work, device_peak_bytes, step_seconds, tier_bytes
from headrace.platform.planning.rank_peak import rank_peak_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import MemoryPlan, Sweep


def wanted_bytes(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    """Peak of every tier of one rank."""
    request = request.with_cuts(plan.cuts)
    if plan.sweep is Sweep.by_chunk:
        return chunks.wanted_bytes(plan, request)
    blocks = request.blocks(plan)
    if request.passes is not None:
        return {Medium.hbm: rank_peak_bytes(plan, request, request.passes), **tier_bytes(blocks)}
    return {Medium.hbm: device_peak_bytes(blocks, plan.prefetch_layers, request.cost()), **tier_bytes(blocks)}


def work_of(plan: MemoryPlan, request: PlanRequest) -> Work:
    """What a micro-batch does beside the model's own compute."""
    request = request.with_cuts(plan.cuts)
    if plan.sweep is Sweep.by_chunk:
        return chunks.work(plan, request)
    return Work.of(request.blocks(plan), plan.prefetch_layers, request.cost())


def seconds(plan: MemoryPlan, request: PlanRequest) -> Seconds:
    """Of one micro-batch; what is unknown of it counts as nothing (ask missing_rates first)."""
    own = request.with_cuts(plan.cuts)
    return step_seconds(work_of(plan, request), plan.prefetch_layers, own.cost(), request.rates())
