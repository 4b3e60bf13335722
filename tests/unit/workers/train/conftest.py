"""Whole tiny runs in this process: one rank, real data, real tiers, everything but a second process."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.storage.core.records import Lease
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import OnStep, RankResult, StepReport
from headrace.workers.testing import tiny_job, tiny_leases
from headrace.workers.train.session import run_rank


@dataclass
class Run:
    """What a run said: reports in order, a draw of every generator after each step, and its result."""

    reports: list[StepReport] = field(default_factory=list)
    draws: list[tuple[float, float, float]] = field(default_factory=list)
    result: RankResult | None = None

    @property
    def curve(self) -> list[tuple[int, float, float, tuple[float, float, float]]]:
        """Step, loss, gradient norm, draws: equal curves are equal runs, to the bit."""
        rows = zip(self.reports, self.draws, strict=True)
        return [(r.step, r.metrics[names.LOSS_TRAIN], r.metrics[names.GRAD_NORM], drawn) for r, drawn in rows]

    @property
    def events(self) -> dict[str, str]:
        """Texts of the events of the whole run, by kind."""
        assert self.result is not None
        return {event["kind"]: event["text"] for event in self.result.stats["events"]}


def run_job(
    job: TrainJob,
    *,
    leases: tuple[Lease, ...] = (),
    stop_after: int | None = None,
    also_on_step: OnStep = lambda report: None,
    **context: Any,
) -> Run:
    """Run a job as the only rank; `stop_after` asks it to stop once that many steps are done."""
    run = Run()

    def on_step(report: StepReport) -> None:
        run.reports.append(report)
        run.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        also_on_step(report)

    def should_stop() -> bool:
        return stop_after is not None and bool(run.reports) and run.reports[-1].step >= stop_after

    run.result = run_rank(job, RankContext(leases=leases, **context), on_step=on_step, should_stop=should_stop)
    return run


@pytest.fixture(scope="session", name="run_job")
def run_job_fixture() -> Callable[..., Run]:
    """The function above."""
    return run_job


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tests' runs: the data is prepared once."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def job(run_folder: Path) -> Callable[..., TrainJob]:
    """tiny_job in a run folder of its own."""
    numbers = itertools.count()

    def make(**overrides: Any) -> TrainJob:
        return tiny_job(run_folder, run=f"run{next(numbers)}", **overrides)

    return make


@pytest.fixture(scope="session")
def leases(run_folder: Path) -> Iterator[tuple[Lease, ...]]:
    """A host and an SSD lease, one MiB each."""
    with tiny_leases(run_folder) as per_rank:
        yield per_rank[0]
