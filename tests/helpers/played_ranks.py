"""What a controller hears from ranks, and what it tells, where a test plays both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from headrace.workers.actors.status import RankFailure, RankPhase, RankStatus
from headrace.workers.telemetry.records import RankEvent, RankOutcome, RankResult, StepReport


def running(rank: int, step: int | None) -> RankStatus:
    """A rank after a step, which it reports."""
    reports = () if step is None else (StepReport(step, rank, {"loss/train": float(step)}),)
    return RankStatus(rank, RankPhase.running, 2 * (step or 0), step, step or 0, reports)


def finished(rank: int, step: int, outcome: RankOutcome = RankOutcome.finished, **stats: Any) -> RankStatus:
    """A rank that has ended."""
    result = RankResult(rank, outcome, step, stats)
    return RankStatus(rank, RankPhase.finished, 2 * step, step, step, (), result)


def failed(rank: int, error: Exception, step: int = 1) -> RankStatus:
    """A rank that has raised."""
    return RankStatus(rank, RankPhase.failed, 2, step, step, (), None, RankFailure.of(error, "trace"))


class Recorded:
    """A recorder that only remembers."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.events: list[RankEvent] = []
        self.stages: list[str] = []
        self.parts: list[str] = []
        self.plans: list[Any] = []

    def on_report(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_event(self, event: RankEvent) -> None:
        self.events.append(event)

    def on_stage(self, text: str) -> None:
        self.stages.append(text)

    def on_plan(self, record: Any) -> None:
        self.plans.append(record)

    def on_part(self, text: str) -> None:
        self.parts.append(text)

    def text(self, kind: str) -> str:
        (event,) = (event for event in self.events if event.kind == kind)
        return event.text


class Clock:
    """The controller's only clock: no time passes but what it sleeps, however busy the machine is."""

    now_s = 0.0

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


class FakeSteering:
    """Decides after the first step, and has a new record when the group starts again."""

    def __init__(self) -> None:
        self.heard: list[StepReport] = []
        self.plan: str | None = None
        self.new_record: dict[str, str] | None = None

    def hear(self, report: StepReport) -> list[RankEvent]:
        self.heard.append(report)
        if report.step != 1:
            return []
        self.plan = "new plan"
        return [RankEvent("replan", "another plan")]

    def take_plan(self) -> str | None:
        plan, self.plan = self.plan, None
        return plan

    def take_record(self) -> dict[str, str] | None:
        record, self.new_record = self.new_record, None
        return record

    def job(self, job: Any) -> Any:
        self.new_record = {"name": "new plan"}
        return SimpleNamespace(run_dir=job.run_dir, plan="new plan")
