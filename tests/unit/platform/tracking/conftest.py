from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.helpers.training import foreign_plan
from headrace.platform.tracking.config import Progress, TrackingConfig
from headrace.platform.tracking.recorder import RunRecorder
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent, StepReport


@pytest.fixture
def plan() -> MemoryPlan:
    """Two blocks, everything resident."""
    return foreign_plan("keep", 2)


@pytest.fixture
def make_report() -> Callable[..., StepReport]:
    """A step of one rank with a few metrics."""

    def make(step: int, rank: int = 0, events: tuple[RankEvent, ...] = (), **more: float) -> StepReport:
        metrics = {names.LOSS_TRAIN: 10.0 / step, names.GRAD_NORM: 1.0, names.STEP_S: 0.5 + rank}
        return StepReport(step, rank, {**metrics, **more}, events)

    return make


@pytest.fixture
def make_recorder(tmp_path: Path) -> Callable[..., RunRecorder]:
    """A recorder of tmp_path/runs/one without MLflow, unless the configuration says otherwise."""

    def make(num_ranks: int = 1, **config: object) -> RunRecorder:
        settings = TrackingConfig(**{"mlflow": False, "progress": Progress.lines, **config})  # type: ignore[arg-type]
        return RunRecorder(tmp_path / "runs" / "one", settings, num_ranks=num_ranks, num_steps=10)

    return make
