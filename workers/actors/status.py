"""A rank's answer to a heartbeat. Plain values that are sent by Ray or by a pipe. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.storage.core.errors import ErrorId, HeadraceError, InputError, MachineError, TransferFailed
from headrace.storage.core.owners import Owner
from headrace.workers.telemetry.records import RankResult, Stage, StepPart, StepReport

# Who leases from the slabs of its node: name and process.
Holder = tuple[str, Owner]


class RankPhase(StrEnum):
    """`waiting`: not started yet; the last two are final."""

    waiting = "waiting"
    running = "running"
    finished = "finished"
    failed = "failed"


class FailureKind(StrEnum):
    """input: the user's; machine: this machine cannot; final: another try would fail alike; other: may pass."""

    input = "input"
    machine = "machine"
    final = "final"
    other = "other"


@dataclass(frozen=True)
class RankFailure:
    """An exception that ended a rank; `error` is its type's name, `id` its case where it is one of ours."""

    kind: FailureKind
    error: str
    message: str
    trace: str
    id: ErrorId = ErrorId.failed

    @classmethod
    def of(cls, error: BaseException, trace: str) -> RankFailure:
        """Sort an exception. A transfer that failed is the one error of ours that another try may not meet."""
        if isinstance(error, InputError):
            kind = FailureKind.input
        elif isinstance(error, MachineError):
            kind = FailureKind.machine
        elif isinstance(error, HeadraceError) and not isinstance(error, TransferFailed):
            kind = FailureKind.final
        else:
            kind = FailureKind.other
        id = error.id if isinstance(error, HeadraceError) else ErrorId.failed
        return cls(kind, type(error).__name__, str(error), trace, id)


@dataclass(frozen=True)
class RankStatus:
    """One answer to a heartbeat.

    Args:
        progress: grows with every sign of life of the training thread: at least one for every layer of a step.
        step: last step that is done; None before the first one.
        num_reports: reports made so far, with those of this answer.
        reports: steps since the last answer, in order.
        stage: what the training thread does now; None before it has begun.
        part: how far it is in it, where it tells.
    """

    rank: int
    phase: RankPhase
    progress: int
    step: int | None
    num_reports: int
    reports: tuple[StepReport, ...] = ()
    result: RankResult | None = None
    failure: RankFailure | None = None
    stage: Stage | None = None
    part: StepPart | None = None


@dataclass(frozen=True)
class RankHome:
    """Where a rank's process is, so that this process is killed and no other.

    Args:
        network: the variables that name its interface; known when it has been started.
    """

    rank: int
    process: Owner
    network: Mapping[str, str] = field(default_factory=dict)
