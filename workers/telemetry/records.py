"""What a rank says about itself. Plain values: they travel through Ray, JSON and MLflow. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class RankOutcome(Enum):
    """How a rank's loop ended."""

    finished = "finished"
    stopped = "stopped"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step of one rank.

    `metrics` maps names of telemetry/names.py to floats; loss and gradient norm are already those of the whole
    group, the perf, mem and io values are this rank's own.
    """

    step: int
    rank: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RankResult:
    """What run_rank returns.

    Args:
        last_step: optimizer steps done in total, counted from the start of the run.
        stats: closing facts (tier stats, engine chosen and why, versions), JSON-able.
    """

    rank: int
    outcome: RankOutcome
    last_step: int
    stats: Mapping[str, Any] = field(default_factory=dict)


OnStep = Callable[[StepReport], None]
ShouldStop = Callable[[], bool]
