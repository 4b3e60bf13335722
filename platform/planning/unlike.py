"""Plans of auto for models with blocks of several kinds: the fastest preset that fits. No torch.

The solver counts how many layers are treated each way, which needs layers that are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from headrace.platform.planning import priced
from headrace.platform.planning.predict import missing_rates
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan, Sweep

SOLVER = "fastest preset"
CHOICES = (
    MemoryPreset.keep,
    MemoryPreset.memo,
    MemoryPreset.ssdtrain,
    MemoryPreset.recompute,
    MemoryPreset.offload_host,
    MemoryPreset.offload_ssd,
    MemoryPreset.alst,
    MemoryPreset.chunk_auto,
)


def fastest_preset(request: PlanRequest) -> MemoryPlan | None:
    """The plan that is predicted to be the fastest of those that fit; None where none does.

    Plans that write too much to the drives, and those whose seconds are not known, come last.
    """
    budgets, rates, wear = request.budgets(), request.rates(), request.ssd_wear_bytes_per_s

    def rank(plan: MemoryPlan) -> tuple[float, ...]:
        work, seconds = priced.work_of(plan, request), priced.seconds(plan, request).total
        wears_out = wear is not None and work.ssd > wear * seconds
        unknown = len(missing_rates(work, rates))
        return (wears_out, unknown, seconds, work.rerun_flops, work.ssd, work.host)

    fitting = [plan for plan in _plans(request) if not budgets.shortages(priced.wanted_bytes(plan, request))]
    if not fitting:
        return None
    best = min(fitting, key=rank)
    return replace(best, name=MemoryPreset.auto.value, solver=f"{SOLVER}: memory={best.name}")


def nearest_bytes(request: PlanRequest) -> dict[Medium, int]:
    """Peaks of every tier under the plan that is the least above the budgets."""
    return min((priced.wanted_bytes(plan, request) for plan in _plans(request)), key=request.budgets().excess)


def _plans(request: PlanRequest) -> Iterator[MemoryPlan]:
    for preset in CHOICES:
        is_its_sweep = request.sweep is None or preset.is_by_chunk == (request.sweep is Sweep.by_chunk)
        if is_its_sweep and (not preset.is_by_chunk or request.may_run_by_chunk):
            groups = None if preset.is_by_chunk else request.head_groups
            yield asked_plan(replace(request, preset=preset, head_groups=groups))
