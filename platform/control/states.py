"""The controller's states, what can befall a group, and how a run ends. Plain values: no Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from headrace.workers.actors.status import RankFailure
from headrace.workers.telemetry.records import RankEvent, RankResult, StepReport


class ControllerState(StrEnum):
    """Where the controller is. Groups are started, run, and are killed before the next one or the end."""

    starting = "starting"
    running = "running"
    stopping = "stopping"
    restarting = "restarting"
    ended = "ended"


class TroubleKind(StrEnum):
    """What happened to a rank: process ended, error raised, no answer, no progress, or a late end."""

    lost = "lost"
    raised = "raised"
    silent = "silent"
    stuck = "stuck"
    late = "late"


@dataclass(frozen=True)
class Trouble:
    """One rank that cannot continue.

    Args:
        step: last step it had reported.
        text: one sentence for people.
        failure: what it raised.
    """

    rank: int
    kind: TroubleKind
    step: int
    text: str
    failure: RankFailure | None = None


class Outcome(StrEnum):
    """How a run ended."""

    finished = "finished"
    stopped = "stopped"
    failed = "failed"


EXIT_CODES = {Outcome.finished: 0, Outcome.failed: 1, Outcome.stopped: 3}


@dataclass(frozen=True)
class RunOutcome:
    """What `launch` returns.

    Args:
        restarts: groups that were started after the first one.
        results: of the ranks of the last group, by rank; empty where it failed.
        failure: why it failed, for people.
        facts: JSON-able: launcher, dashboard_url, address, placement, logs.
    """

    outcome: Outcome
    restarts: int
    results: tuple[RankResult, ...] = ()
    failure: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 finished, 1 failed, 3 stopped by a signal after a checkpoint."""
        return EXIT_CODES[self.outcome]


class Recorder(Protocol):
    """The records of a run. Called from the driver's thread; must not block."""

    def on_report(self, report: StepReport) -> None:
        """One step of one rank; steps since the last checkpoint come again after a restart."""

    def on_event(self, event: RankEvent) -> None:
        """Something that happened to the group."""

    def on_plan(self, record: Mapping[str, Any]) -> None:
        """The content of plan.json has changed."""

    def on_stage(self, text: str) -> None:
        """What a start is doing now, a few words; said until the first step is done."""

    def on_part(self, text: str) -> None:
        """How far the step at hand is, a few words; said whenever it has changed."""
