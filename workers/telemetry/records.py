"""What a rank says about itself. Plain values: they travel through Ray, JSON and MLflow. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

# The kind of the event with which the ranks say that they have changed their plan.
REPLANNED = "replanned"


class Stage(StrEnum):
    """What a rank's training thread is doing, in words for people."""

    group = "meeting the other ranks"
    data = "opening the data"
    model = "building the model"
    resume = "reading the checkpoint"
    rows = "reading rows"
    agree = "waiting for the other ranks"
    compute = "computing the step"
    evaluate = "evaluating"
    save = "saving a checkpoint"


@dataclass(frozen=True)
class StepPart:
    """How far the pass over a micro-batch is; `str` gives it in words.

    Args:
        stage / num_stages: 1 is the forward pass and 2 the backward pass; by chunk: keys and values, then gradients. An
            evaluation has one.
        number / total: of the chunk, or the layer, that is at work, counted in the order in which they run.
        unit: "chunk" or "layer".
    """

    stage: int
    num_stages: int
    number: int
    total: int
    unit: str
    micro_batch: int = 1
    num_micro_batches: int = 1

    def __str__(self) -> str:
        words = f"stage {self.stage}/{self.num_stages}, {self.unit} {self.number}/{self.total}"
        if self.num_micro_batches == 1:
            return words
        return f"micro-batch {self.micro_batch}/{self.num_micro_batches}, {words}"


class RankOutcome(StrEnum):
    """How a rank's loop ended."""

    finished = "finished"
    stopped = "stopped"


@dataclass(frozen=True)
class RankEvent:
    """Something that happened once and that people should read.

    Args:
        kind: resumed | checkpoint_saved | checkpoint_failed | checkpoint_damaged | data_changed | settings_changed |
            step_resumed | step_restarted | record_failed | empty_step | step_skipped | endurance_low | endurance_over |
            tier_drift | replanned | plan_checked | replan | larger_tiers | replan_failed | addresses_replanned |
            addresses_dropped.
        text: one sentence for people; names file, value and what was done.
        facts: JSON-able.
    """

    kind: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step of one rank.

    `metrics` maps names of telemetry/names.py to floats; loss and gradient norm are already those of the whole
    group, the perf, mem and io values are this rank's own. `step` counts finished steps: the first report has 1.
    `events` are what happened since the rank's last report; what concerns the whole group comes from rank 0 only.
    """

    step: int
    rank: int
    metrics: Mapping[str, float]
    events: tuple[RankEvent, ...] = ()


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


class OnStage(Protocol):
    """Called when the training thread begins something else."""

    def __call__(self, stage: Stage, part: StepPart | None = None) -> None:
        """It begins a stage, or the next part of it; every call is a sign of life."""
