"""What to do when ranks fail. Pure: troubles and settings in, a decision out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from headrace.platform.control.states import Trouble, TroubleKind
from headrace.workers.actors.status import FailureKind


class Action(StrEnum):
    """`abort` is for what the user must change (exit code 2), `give_up` for a run that failed (exit code 1)."""

    restart = "restart"
    give_up = "give_up"
    abort = "abort"


@dataclass(frozen=True)
class Decision:
    """What to do, the trouble that caused the others, and why."""

    action: Action
    cause: Trouble
    why: str


# A rank that died takes its neighbours' collectives with it: what those raise says nothing.
_BLAME = {TroubleKind.lost: 1, TroubleKind.silent: 3, TroubleKind.stuck: 4, TroubleKind.late: 4}
_BLAME_RAISED = {FailureKind.input: 0, FailureKind.machine: 2, FailureKind.final: 2, FailureKind.other: 5}


def decide(
    troubles: Sequence[Trouble],
    *,
    restarts_done: int,
    max_restarts: int,
    stopping: bool,
    earlier: Sequence[Trouble] = (),
) -> Decision:
    """Decide for the group, which cannot continue without the failed ranks.

    Args:
        troubles: of this group, at least one.
        stopping: a signal has asked the run to end.
        earlier: causes of the groups before.

    Returns:
        Bad input and machines that cannot are for the user. A failure that would happen again is final: one that a
        rank calls so, or the same one twice at the same step. All others restart the group while restarts are left.
    """
    cause = min(troubles, key=_blame)
    failure = cause.failure
    if failure is not None and failure.kind in (FailureKind.input, FailureKind.machine):
        return Decision(Action.abort, cause, "a restart would fail in the same way")
    if failure is not None and failure.kind is FailureKind.final:
        return Decision(Action.give_up, cause, "a restart would fail in the same way")
    if any(_same(cause, before) for before in earlier):
        return Decision(Action.give_up, cause, f"the same failure twice after step {cause.step}")
    if stopping:
        return Decision(Action.give_up, cause, "the run was being stopped; its last committed checkpoint is kept")
    if restarts_done >= max_restarts:
        return Decision(Action.give_up, cause, f"cluster.max_restarts={max_restarts} is used up")
    return Decision(Action.restart, cause, f"restart {restarts_done + 1} of {max_restarts}")


def _blame(trouble: Trouble) -> tuple[int, int]:
    """Smaller is more to blame; of equals the rank with the least progress."""
    if trouble.failure is None:
        return _BLAME[trouble.kind], trouble.step
    if trouble.kind is TroubleKind.lost:  # it left the cause of its death
        return 0, trouble.step
    return _BLAME_RAISED[trouble.failure.kind], trouble.step


def _same(a: Trouble, b: Trouble) -> bool:
    if a.failure is None or b.failure is None:
        return False  # killed twice at one step may be chance, as a machine that is taken away
    return (a.step, a.failure.error, a.failure.message) == (b.step, b.failure.error, b.failure.message)
