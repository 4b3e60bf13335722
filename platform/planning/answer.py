"""The answer to a request: a plan, or a refusal with three changes that would fit. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from headrace.platform.planning.predict import Correction
from headrace.platform.planning.refuse import refusal
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan

# A profile is not wrong by more: what says so in a run's record was not written by a run.
MIN_RATIO = 1e-6


def resumed(
    request: PlanRequest, record: Mapping[str, Any], fits: Callable[[PlanRequest], object] = find_plan
) -> tuple[PlanRequest, str | None]:
    """The request of a run that goes on: at the rates that it measured, and auto keeps sweep and cuts, because other
    cuts give other bits.

    Args:
        record: the content of the run's plan.json.
        fits: true where there are plans for a request.

    Returns:
        The request, and a warning where the cuts cannot be kept.
    """
    request = replace(request, correction=_correction(request, record))
    if request.preset is not MemoryPreset.auto or request.buckets:
        return request, None
    try:
        plan = MemoryPlan.from_dict(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        return (
            request,
            "plan.json of the run cannot be read: with a new plan sums may be rounded otherwise",
        )
    own = request.with_cuts_of(plan)
    if not fits(own):
        return request, "the sweep and cuts of the run so far do not fit any more: sums are rounded otherwise from here"
    return own, None


def _correction(request: PlanRequest, record: Mapping[str, Any]) -> Correction:
    """What the run has measured of the rates of this hardware; nothing where its record does not say."""
    found = record.get("correction")
    if not isinstance(found, Mapping) or found.get("hardware") != request.profile.name:
        return request.correction
    ratios = {name: found.get(name) for name in asdict(request.correction)}
    if not all(isinstance(ratio, float) and MIN_RATIO < ratio < 1 / MIN_RATIO for ratio in ratios.values()):
        return request.correction
    return Correction(**ratios)  # type: ignore[arg-type]


def solve_plan(request: PlanRequest) -> MemoryPlan:
    """The plan of a request, with what it is predicted to cost.

    Raises:
        InputError: no plan of the asked preset holds the budgets; names the tier, the bytes wanted, the bytes there
            and three changes that would fit.
    """
    plan = find_plan(request)
    if plan is None:
        raise refusal(request)
    return plan
