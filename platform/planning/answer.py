"""The answer to a request: a plan, or a refusal with three changes that would fit. No torch."""

from __future__ import annotations

from headrace.platform.planning.refuse import refusal
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.workers.memory.plan import MemoryPlan


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
