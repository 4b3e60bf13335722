"""The failure policy, case by case."""

from __future__ import annotations

import pytest

from headrace.platform.control.failure import Action, decide
from headrace.platform.control.states import Trouble, TroubleKind
from headrace.storage.core.errors import InputError, MachineError, TierFull, TransferFailed
from headrace.workers.actors.status import FailureKind, RankFailure


def raised(rank: int, error: BaseException, step: int = 5) -> Trouble:
    return Trouble(rank, TroubleKind.raised, step, str(error), RankFailure.of(error, "trace"))


LOST = Trouble(1, TroubleKind.lost, 5, "rank 1 died")
SILENT = Trouble(1, TroubleKind.silent, 5, "rank 1 is silent")
STUCK = Trouble(0, TroubleKind.stuck, 5, "rank 0 is stuck")
PEER = raised(0, RuntimeError("Connection closed by peer"))


def choose(*troubles: Trouble, done: int = 0, stopping: bool = False, earlier=()):
    return decide(list(troubles), restarts_done=done, max_restarts=2, stopping=stopping, earlier=earlier)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InputError("x"), FailureKind.input),
        (MachineError("x"), FailureKind.machine),
        (TierFull("x"), FailureKind.final),
        (TransferFailed("x"), FailureKind.other),
        (RuntimeError("x"), FailureKind.other),
        (KeyboardInterrupt(), FailureKind.other),
    ],
)
def test_exceptions_are_sorted(error: BaseException, kind: FailureKind) -> None:
    assert RankFailure.of(error, "").kind is kind


@pytest.mark.parametrize("trouble", [LOST, SILENT, STUCK, PEER, raised(0, TransferFailed("checksum"))])
def test_what_may_pass_restarts_until_restarts_are_used_up(trouble: Trouble) -> None:
    assert choose(trouble).action is Action.restart
    assert choose(trouble, done=1).action is Action.restart
    last = choose(trouble, done=2)
    assert last.action is Action.give_up
    assert "max_restarts=2" in last.why


@pytest.mark.parametrize("error", [InputError("bad row"), MachineError("no memory")])
def test_what_the_user_must_change_is_never_tried_again(error: BaseException) -> None:
    assert choose(PEER, raised(1, error)).action is Action.abort
    assert choose(PEER, raised(1, error)).cause.rank == 1


def test_what_would_happen_again_is_final() -> None:
    assert choose(raised(0, TierFull("full"))).action is Action.give_up
    assert choose(PEER, earlier=[PEER]).action is Action.give_up
    assert choose(raised(0, RuntimeError("x"), step=6), earlier=[raised(0, RuntimeError("x"))]).action is Action.restart
    assert choose(LOST, earlier=[LOST]).action is Action.restart


def test_the_dead_rank_is_to_blame_not_its_neighbours() -> None:
    assert choose(PEER, LOST).cause is LOST
    assert choose(PEER, raised(1, MachineError("the others did not come")), LOST).cause is LOST
    assert choose(STUCK, SILENT).cause is SILENT


def test_a_run_that_is_being_stopped_is_not_started_again() -> None:
    assert choose(LOST, stopping=True).action is Action.give_up
