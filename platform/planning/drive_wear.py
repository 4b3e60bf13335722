"""What a plan takes out of the drives' rated life. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.platform.planning.priced import work_of
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.endurance import DAY_S, TB, YEAR_S, StripedWear
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names


@dataclass(frozen=True)
class PlannedWear:
    """Of all drives of one node together, which are new and see nothing else.

    Args:
        step_bytes: written by all ranks of the node in one step.
        rated_bytes: that the drives are warranted for.
        step_s: predicted; None where it could not be.
    """

    step_bytes: int
    rated_bytes: float
    step_s: float | None

    @property
    def num_steps(self) -> float:
        """Steps until the rating is used up."""
        return self.rated_bytes / self.step_bytes

    @property
    def bytes_per_day(self) -> float | None:
        """At the predicted step time."""
        return None if self.step_s is None else self.step_bytes / self.step_s * DAY_S

    @property
    def days(self) -> float | None:
        """Of training until the rating is used up."""
        return None if self.step_s is None else self.num_steps * self.step_s / DAY_S

    def to_dict(self) -> dict[str, float | None]:
        """Plain JSON form."""
        return {
            "bytes_per_step": self.step_bytes,
            "bytes_per_day": self.bytes_per_day,
            "rated_bytes": self.rated_bytes,
            "days": self.days,
        }


def planned_wear(plan: MemoryPlan, request: PlanRequest, config: EnduranceConfig) -> PlannedWear | None:
    """None where the plan leaves the SSD alone or tiers.ssd.endurance.rated_tbw is not set."""
    moved = request.micro_batches * work_of(plan, request).ssd
    if moved == 0 or config.rated_tbw is None:
        return None
    return PlannedWear(request.ranks_per_node * moved, config.rated_tbw * TB, plan.predicted.get(names.STEP_S))


def without_spent_drive(
    request: PlanRequest, config: EnduranceConfig, folders: Sequence[Path]
) -> tuple[PlanRequest, str | None]:
    """The request of a run that leaves drives alone whose write budget up to today is spent, if a plan without fits.

    Args:
        folders: of the slab files, on this machine.

    Returns:
        The request, and a sentence for the user where the budget is spent.
    """
    if request.preset is not MemoryPreset.auto or request.ssd_budget_bytes == 0 or config.rated_tbw is None:
        return request, None
    wear = StripedWear(folders)
    budget, now_s = wear.budget(config.rated_tbw, config.lifetime_years), time.time()
    used = max(each.budget_used(budget, now_s) for each in wear.wears)
    if used < 1.0:
        return request, None
    own = replace(request, ssd_budget_bytes=0)
    fits = find_plan(own) is not None
    text = (
        f"{100 * used:.0f} % of the drive's write budget up to today is spent (tiers.ssd.endurance.rated_tbw="
        f"{config.rated_tbw:g} over lifetime_years={config.lifetime_years:g}): "
    )
    return (own, text + "the plan leaves it alone") if fits else (request, text + "no plan without it fits")


def wear_lines(plan: MemoryPlan, request: PlanRequest, config: EnduranceConfig) -> list[str]:
    """The same for people, at most 120 columns; a warning where the drives would not last as long as wanted."""
    wear = planned_wear(plan, request, config)
    if wear is None:
        return []
    head = f"SSD wear per node: {wear.step_bytes / 1e9:.4g} GB a step"
    if wear.days is None or wear.bytes_per_day is None:
        return [f"{head}; rated_tbw={config.rated_tbw:g} is used up after {wear.num_steps:.4g} steps"]
    lines = [
        f"{head}, {wear.bytes_per_day / TB:.3g} TB a day: "
        f"tiers.ssd.endurance.rated_tbw={config.rated_tbw:g} is used up after {wear.days:.3g} days"
    ]
    wanted_days = config.lifetime_years * YEAR_S / DAY_S
    if wear.days < wanted_days:
        lines.append(
            f"  warning: less than the {wanted_days:.4g} days of tiers.ssd.endurance.lifetime_years="
            f"{config.lifetime_years:g}, trained without a pause"
        )
    return lines
