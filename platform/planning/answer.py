"""The answer to a request: a plan, or a refusal with three changes that would fit. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.platform.planning.refuse import refusal
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan


def resumed(request: PlanRequest, record: Mapping[str, Any]) -> tuple[PlanRequest, str | None]:
    """The request of a run that goes on: auto keeps sweep and cuts, because other cuts give other bits.

    Args:
        record: the content of the run's plan.json.

    Returns:
        The request, and a warning where the cuts cannot be kept.
    """
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
    if find_plan(own) is None:
        return request, "the sweep and cuts of the run so far do not fit any more: sums are rounded otherwise from here"
    return own, None


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
