"""The controller over a group that is played by the test."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.helpers.played_ranks import Clock, FakeSteering, Recorded, failed, finished, running
from headrace.helpers.tiers import has_id
from headrace.platform.control import controller as module
from headrace.platform.control import inline
from headrace.platform.control import launch as launching
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.controller import Controller
from headrace.platform.control.group import Answers, RankLost
from headrace.platform.control.states import ControllerState, Outcome
from headrace.storage.config import TiersConfig
from headrace.storage.core.errors import ErrorId, InputError, TierFull
from headrace.storage.core.owners import this_process
from headrace.workers.actors.journal import ReportJournal, journal_path
from headrace.workers.actors.memory_guard import cause_path
from headrace.workers.actors.status import RankHome, RankPhase, RankStatus
from headrace.workers.telemetry.records import RankEvent, RankOutcome, Stage, StepPart, StepReport
from headrace.workers.train.config import TrainConfig

Script = Callable[[int, int], Any]  # (rank, round) -> RankStatus, a str (its death) or None (silence)


class FakeRanks:
    """Answers each poll by the script."""

    def __init__(self, script: Script, num_ranks: int) -> None:
        self.script, self.num_ranks = script, num_ranks
        self.rounds = dict.fromkeys(range(num_ranks), 0)
        self.stop_requests = 0
        self.told: list[tuple[int, Any]] = []
        self.killed = False

    def send(self, rank: int, method: str, *args: Any) -> Any:
        self.stop_requests += method == "request_stop"
        self.told += [(rank, *args)] if method == "change_plan" else []
        self.rounds[rank] += method == "poll"
        return (rank, method, self.rounds[rank])

    def collect(self, tickets: Any, timeout_s: float) -> Answers:
        answers = Answers()
        for ticket in tickets:
            rank, method, number = ticket
            if method == "home":
                answer: Any = RankHome(rank, this_process())
            elif method == "stacks":
                answer = f"stack of {rank}"
            else:
                answer = self.script(rank, number)
            if isinstance(answer, str) and method == "poll":
                answers.lost[ticket] = answer
            elif answer is not None:
                answers.values[ticket] = answer
        return answers

    def kill(self) -> None:
        self.killed = True


class FakeBackend:
    """Hands out one group per script."""

    def __init__(self, *scripts: Script | Exception, num_ranks: int = 1) -> None:
        self.scripts, self.num_ranks = list(scripts), num_ranks
        self.groups: list[FakeRanks] = []
        self.jobs: list[Any] = []
        self.facts: dict[str, Any] = {"launcher": "fake"}
        self.lost: list[RankEvent] = []
        self.missing: list[str] = []

    def missing_room(self) -> str | None:
        return self.missing.pop() if self.missing else None

    def start_group(self, job: Any, attempt: int) -> FakeRanks:
        self.jobs.append(job)
        assert attempt == len(self.groups)
        script = self.scripts.pop(0)
        if isinstance(script, Exception):
            self.groups.append(FakeRanks(lambda rank, number: None, 1))
            raise script
        self.groups.append(FakeRanks(script, self.num_ranks))
        return self.groups[-1]

    def lost_owners(self) -> list[RankEvent]:
        lost, self.lost = self.lost, []
        return lost

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s, sleep=clock.sleep))


@pytest.fixture
def control(tmp_path: Path):
    def run(backend: FakeBackend, *, stop: Callable[[], bool] = lambda: False, steering: Any = None, **cluster: Any):
        recorded = Recorded()
        controller = Controller(backend, ClusterConfig(**cluster), recorded, stop_requested=stop, steering=steering)
        job: Any = SimpleNamespace(run_dir=str(tmp_path))
        try:
            return controller.run(job), recorded
        finally:
            assert controller.state is ControllerState.ended
            assert all(group.killed for group in backend.groups if group.script is not None and group.rounds[0])

    return run


def two_steps(rank: int, number: int) -> RankStatus:
    return running(rank, number) if number < 3 else finished(rank, 2)


def dies(rank: int, number: int) -> Any:
    return running(rank, number) if number < 2 else "SIGKILL"


def test_a_plan_is_told_to_all_ranks_once_and_is_that_of_the_next_group(control) -> None:
    backend, steering = FakeBackend(dies, two_steps, num_ranks=2), FakeSteering()
    outcome, recorded = control(backend, steering=steering)
    assert outcome.outcome is Outcome.finished
    assert steering.heard == recorded.reports
    # Both ranks report step 1 in one round, so the plan is decided twice and told once a round.
    assert backend.groups[0].told == [(0, "new plan"), (1, "new plan")]
    assert "another plan" in [event.text for event in recorded.events]
    assert [getattr(job, "plan", None) for job in backend.jobs] == [None, "new plan"]
    assert recorded.plans == [{"name": "new plan"}]


def test_an_error_of_the_planner_does_not_end_the_run(control, monkeypatch: pytest.MonkeyPatch) -> None:
    def hear(self: FakeSteering, report: StepReport) -> list[RankEvent]:
        raise ZeroDivisionError("no rate")

    monkeypatch.setattr(FakeSteering, "hear", hear)
    outcome, recorded = control(FakeBackend(two_steps), steering=FakeSteering())
    assert outcome.outcome is Outcome.finished
    assert [report.step for report in recorded.reports] == [1, 2]
    assert "not checked any more: ZeroDivisionError: no rate" in recorded.text("replan_failed")


def test_reports_arrive_in_order_and_the_end_is_told(control) -> None:
    outcome, recorded = control(FakeBackend(two_steps))
    assert (outcome.outcome, outcome.exit_code, outcome.restarts) == (Outcome.finished, 0, 0)
    assert [report.step for report in recorded.reports] == [1, 2]
    assert outcome.results[0].last_step == 2


def test_an_owner_that_dies_is_an_event_and_the_run_goes_on(control) -> None:
    backend = FakeBackend(two_steps)
    backend.lost = [RankEvent("owner_lost", "host-memory has died")]
    outcome, recorded = control(backend)
    assert outcome.outcome is Outcome.finished
    assert recorded.text("owner_lost") == "host-memory has died"


def test_a_start_says_what_it_is_doing_until_the_first_step_is_done(control) -> None:
    def script(rank: int, number: int) -> RankStatus:
        stages = [Stage.group, Stage.data, Stage.data, Stage.model, Stage.rows, Stage.compute]
        if number <= len(stages):
            return RankStatus(0, RankPhase.running, number, None, 0, stage=stages[number - 1])
        return replace(two_steps(0, number - len(stages)), stage=Stage.save)

    _, recorded = control(FakeBackend(script))
    assert recorded.stages == ["ranks", Stage.group.value, Stage.data.value, Stage.model.value, "first step"]


def chunk(number: int, *, hangs_at: int = 10**6) -> RankStatus:
    """The second step, a chunk every four polls of half a second; 40 chunks."""
    done = min(number // 4, hangs_at)
    part = StepPart(2, 2, done, 40, "chunk")
    return RankStatus(0, RankPhase.running, 2 + done, 1, 1, stage=Stage.compute, part=part)


def test_a_step_longer_than_the_hang_timeout_lives_while_its_chunks_advance(control) -> None:
    def script(rank: int, number: int) -> RankStatus:
        if number == 1:
            return running(0, 1)
        return chunk(number) if number <= 160 else finished(0, 2)

    outcome, recorded = control(FakeBackend(script), hang_timeout_s=5.0)
    assert (outcome.outcome, outcome.restarts) == (Outcome.finished, 0)
    assert recorded.parts == [f"stage 2/2, chunk {number}/40" for number in range(41)]


def test_a_chunk_that_hangs_is_found(control) -> None:
    def script(rank: int, number: int) -> RankStatus:
        return running(0, 1) if number == 1 else chunk(number, hangs_at=37)

    outcome, recorded = control(FakeBackend(script, two_steps), hang_timeout_s=5.0)
    assert outcome.restarts == 1
    assert "(stage 2/2, chunk 37/40)" in recorded.text("rank_hung")


def test_a_dead_rank_restarts_the_whole_group(control) -> None:
    backend = FakeBackend(lambda rank, number: dies(rank, number) if rank else running(0, 1), two_steps, num_ranks=2)
    outcome, recorded = control(backend)
    assert (outcome.outcome, outcome.restarts) == (Outcome.finished, 1)
    assert backend.groups[0].killed
    assert "rank 1 ended after step 1: SIGKILL" in recorded.text("group_restarted")


def test_a_rank_that_the_kernel_killed_for_memory_is_told_so(control, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter((3, 4))
    monkeypatch.setattr(module, "num_oom_kills", lambda: next(counts))
    outcome, _ = control(FakeBackend(dies), max_restarts=0)
    assert "SIGKILL; meanwhile the kernel of this machine killed 1 process(es)" in outcome.failure


def test_a_rank_that_its_guard_ended_names_the_cause_and_is_not_started_again(control, tmp_path: Path) -> None:
    path = cause_path(tmp_path, 1, 0)
    path.parent.mkdir(parents=True)
    path.write_text("host memory is nearly used up")
    outcome, _ = control(FakeBackend(dies, num_ranks=2), max_restarts=2, num_workers=2)
    assert (outcome.outcome, outcome.exit_code, outcome.restarts) == (Outcome.failed, 1, 0)
    assert "host memory is nearly used up [host_memory_low]" in outcome.failure


def test_the_id_of_a_rank_s_error_arrives(control) -> None:
    path_wrong = InputError("tiers.ssd.path=/x: wrong", id=ErrorId.ssd_path_unusable)
    with pytest.raises(InputError, check=has_id(ErrorId.ssd_path_unusable)):
        control(FakeBackend(lambda rank, number: failed(rank, path_wrong)))


def test_restarts_end(control) -> None:
    outcome, recorded = control(FakeBackend(*[dies] * 3), max_restarts=2)
    assert (outcome.outcome, outcome.exit_code, outcome.restarts) == (Outcome.failed, 1, 2)
    assert "max_restarts=2" in outcome.failure
    assert "rank0.log" in recorded.text("run_failed")
    assert len(outcome.facts["failures"]) == 3


def test_a_group_that_does_not_come_up_counts_as_lost(control) -> None:
    outcome, _ = control(FakeBackend(RankLost(0, "rank 0 did not start"), two_steps))
    assert (outcome.outcome, outcome.restarts) == (Outcome.finished, 1)


def test_a_lost_node_is_waited_for(control) -> None:
    backend = FakeBackend(dies, two_steps)
    backend.missing = ["1 of 2 nodes are there"] * 20
    outcome, recorded = control(backend, node_wait_s=10.0)
    assert (outcome.outcome, outcome.restarts) == (Outcome.finished, 1)
    assert "up to 10 s (cluster.node_wait_s) for room: 1 of 2 nodes" in recorded.text("waiting_for_nodes")
    assert "after 10 s" in recorded.text("nodes_are_back")
    assert recorded.stages == ["ranks", "waits for nodes, 10 s at most", "ranks"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_lost_node_that_does_not_come_back_ends_the_run(control, stops: bool) -> None:
    backend = FakeBackend(dies, two_steps)
    backend.missing = ["1 of 2 nodes are there"] * 21
    asked = iter([False] * 5)
    outcome, _ = control(backend, stop=lambda: stops and next(asked, True), node_wait_s=10.0)
    assert (outcome.outcome, outcome.exit_code, len(backend.groups)) == (Outcome.failed, 1, 1)
    assert ("stopped while it waited" if stops else "within 10 s (cluster.node_wait_s)") in outcome.failure
    assert "rank 0 ended after step 1: SIGKILL" in outcome.failure


def test_bad_input_is_raised_with_the_words_of_the_rank_that_met_it_and_nothing_is_tried_again(control) -> None:
    def script(rank: int, number: int) -> Any:
        if rank == 0:
            return failed(0, RuntimeError("Connection closed by peer"))
        return running(1, 1) if number < 4 else failed(1, InputError("row 7 of data.bin is broken"))

    with pytest.raises(InputError, match=r"^row 7 of data.bin is broken$"):
        control(FakeBackend(script, two_steps, num_ranks=2))


def test_a_hanging_group_leaves_its_stacks_and_is_restarted(control, tmp_path: Path) -> None:
    def hangs(rank: int, number: int) -> Any:
        return running(rank, 1) if number == 1 or rank == 0 else None

    outcome, recorded = control(FakeBackend(hangs, two_steps, num_ranks=2), heartbeat_timeout_s=0.5)
    assert outcome.restarts == 1
    assert "has not answered" in recorded.text("rank_hung")
    stacks = (tmp_path / "logs" / "stacks-attempt0.txt").read_text()
    assert stacks == "=== rank 0\nstack of 0\n=== rank 1\nthe process does not answer\n\n"  # it is not asked


def test_a_signal_stops_the_ranks_once_and_the_exit_code_says_so(control) -> None:
    def script(rank: int, number: int) -> Any:
        return finished(rank, 3, RankOutcome.stopped) if backend.groups[0].stop_requests >= 2 else running(rank, number)

    backend = FakeBackend(script, num_ranks=2)
    outcome, _ = control(backend, stop=lambda: backend.groups[0].rounds[0] >= 2)
    assert (outcome.outcome, outcome.exit_code) == (Outcome.stopped, 3)
    assert backend.groups[0].stop_requests == 2


def test_a_rank_that_dies_while_it_is_being_stopped_ends_the_run(control) -> None:
    outcome, _ = control(FakeBackend(dies), stop=lambda: True)
    assert outcome.exit_code == 1
    assert "committed checkpoint is kept" in outcome.failure


def test_ranks_that_do_not_end_in_time_after_a_signal_are_killed_and_the_run_has_failed(control) -> None:
    backend = FakeBackend(lambda rank, number: running(rank, 1))
    outcome, _ = control(backend, stop=lambda: True, stop_timeout_s=0.05)
    assert (outcome.outcome, outcome.exit_code) == (Outcome.failed, 1)
    assert backend.groups[0].killed
    assert "cluster.stop_timeout_s" in outcome.failure
    assert "committed checkpoint is kept" in outcome.failure


def test_reports_that_nobody_fetched_come_from_the_journal(control, tmp_path: Path) -> None:
    path = journal_path(tmp_path, 0, 0)
    with ReportJournal(path) as journal:
        for step in (1, 2, 3):
            journal.append(StepReport(step, 0, {"loss/train": 0.1 * step}, (RankEvent("checkpoint_saved", "x"),)))
    outcome, recorded = control(FakeBackend(dies, two_steps))
    assert outcome.restarts == 1
    assert [report.step for report in recorded.reports] == [1, 2, 3, 1, 2]
    assert recorded.reports[2] == StepReport(3, 0, {"loss/train": 0.1 * 3}, (RankEvent("checkpoint_saved", "x"),))
    assert not path.exists()


def test_events_after_the_last_report_are_told_once(control) -> None:
    events = [{"kind": "resumed", "text": "a", "facts": {}}, {"kind": "checkpoint_saved", "text": "b", "facts": {}}]

    def script(rank: int, number: int) -> Any:
        if number > 1:
            return finished(0, 1, events=events)
        return RankStatus(0, RankPhase.running, 2, 1, 1, (StepReport(1, 0, {}, (RankEvent("resumed", "a"),)),))

    _, recorded = control(FakeBackend(script))
    assert [event.text for event in recorded.events if event.kind in ("resumed", "checkpoint_saved")] == ["b"]


def test_what_fails_after_a_rank_has_failed_does_not_take_its_place(control, monkeypatch) -> None:
    """The ranks cannot be ended in order, and the journal's folder is read-only."""

    def script(rank: int, number: int) -> RankStatus:
        return failed(rank, TierFull("ssd tier: no room"))

    def kill(self: FakeRanks) -> None:
        self.killed = True
        raise RuntimeError("kill failed")

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FakeRanks, "kill", kill)
    monkeypatch.setattr(Path, "unlink", unlink)
    outcome, recorded = control(FakeBackend(script))
    assert outcome.outcome is Outcome.failed
    assert "TierFull: ssd tier: no room" in outcome.failure
    assert "kill failed" in recorded.text("kill_failed")
    assert "Read-only" in recorded.text("journal_failed")


@pytest.mark.parametrize("broken", ["kill", "lost_owners", "close", "on_event"])
def test_an_interrupt_and_bad_input_go_through_every_clean_up_that_fails(
    broken: str, tmp_path: Path, monkeypatch
) -> None:
    """Through all of `launch`: a group that cannot be killed, a backend or a recorder that fails."""
    backend, recorded = FakeBackend(), Recorded()
    backend.facts["num_ranks"] = 1
    for error in (KeyboardInterrupt("once more"), InputError("the first error")):
        first, done = error, []

        def fail(*args: Any, error: BaseException = error, done: list[int] = done, **kwargs: Any) -> Any:
            done.append(1)
            raise error

        def later(*args: Any, done: list[int] = done, **kwargs: Any) -> Any:
            if done:
                raise RuntimeError("a clean-up failed")
            return []

        backend.scripts, backend.groups = [two_steps], []
        with monkeypatch.context() as patch:
            patch.setattr(Controller, "_watch", fail)
            patch.setattr(inline, "InlineBackend", lambda *words, run: backend)
            owner = FakeRanks if broken == "kill" else Recorded if broken == "on_event" else FakeBackend
            patch.setattr(owner, broken, later)
            job: Any = SimpleNamespace(run_dir=str(tmp_path), tiers=TiersConfig(), train=TrainConfig())
            with pytest.raises(type(first)) as caught:
                launching.launch(job, ClusterConfig(launcher=Launcher.inline), recorded, host_bytes=0, ssd_bytes=0)
        assert caught.value is first
