"""Runs a job to its end over as many groups of ranks as it takes. States are typed, policies are pure functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.failure import Action, Decision, decide
from headrace.platform.control.group import Backend, Group, RankLost
from headrace.platform.control.states import ControllerState, Outcome, Recorder, RunOutcome, Trouble, TroubleKind
from headrace.platform.control.watch import Watch
from headrace.platform.planning.steer import Steering
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.actors.journal import journal_path, read_journal
from headrace.workers.actors.memory_guard import cause_of_death, cause_path, num_oom_kills
from headrace.workers.actors.rank import log_path
from headrace.workers.actors.status import FailureKind, RankPhase, RankStatus
from headrace.workers.job import TrainJob
from headrace.workers.telemetry.records import RankEvent, RankOutcome, RankResult, Stage, StepPart, StepReport

POLL_S = 0.5
# A rank that raises often does so because another has died: who died is known a moment later.
GRACE_S = 2.0
STACKS_TIMEOUT_S = 5.0
FIRST_STEP = (Stage.rows, Stage.agree, Stage.compute)


@dataclass
class _Attempt:
    """One group from start to end: what it reported, and how its ranks ended."""

    number: int
    num_reports: dict[int, int] = field(default_factory=dict)
    num_events: int = 0
    stage: str = ""
    part: StepPart | None = None
    results: dict[int, RankResult] = field(default_factory=dict)
    troubles: dict[int, Trouble] = field(default_factory=dict)


class Controller:
    """Starts a group, watches it, and starts the next one where the policy says so.

    Args:
        stop_requested: whether a signal has asked the run to end after a checkpoint.
        steering: compares the run with its plan, and changes it; None: nobody does.
    """

    def __init__(
        self,
        backend: Backend,
        cluster: ClusterConfig,
        recorder: Recorder,
        *,
        stop_requested: Callable[[], bool],
        steering: Steering | None = None,
    ) -> None:
        self.state = ControllerState.starting
        self._backend, self._cluster, self._recorder = backend, cluster, recorder
        self._stop_requested, self._steering = stop_requested, steering
        self._causes: list[Trouble] = []

    def run(self, job: TrainJob) -> RunOutcome:
        """Run the job.

        Raises:
            InputError, MachineError: a rank met bad input, or a machine that cannot; nothing is started again.
        """
        while True:
            attempt = self._run_group(job, len(self._causes))
            if not attempt.troubles:
                return self._ended(attempt)
            decision = decide(
                list(attempt.troubles.values()),
                restarts_done=attempt.number,
                max_restarts=self._cluster.max_restarts,
                stopping=self._stop_requested(),
                earlier=self._causes,
            )
            self._causes.append(decision.cause)
            if decision.action is Action.restart and (missing := self._wait_for_room()) is not None:
                decision = replace(decision, action=Action.give_up, why=missing)
            if decision.action is not Action.restart:
                return self._failed(job, decision, attempt)
            self.state = ControllerState.restarting
            if self._steering is not None:
                job = self._steering.job(job)
                self._steer(self._steering)
            self._say("group_restarted", f"{decision.cause.text}; {decision.why}, from the newest checkpoint", decision)

    def _wait_for_room(self) -> str | None:
        """Wait until the lost nodes, or others, have room for a group; why there is none when the time is up."""
        begin_s, said = time.monotonic(), False
        while (missing := self._backend.missing_room()) is not None:
            wait_s = self._cluster.node_wait_s
            if self._stop_requested():
                return f"stopped while it waited for room: {missing}"
            if time.monotonic() - begin_s >= wait_s:
                return f"no room for its ranks within {wait_s:g} s (cluster.node_wait_s): {missing}"
            if not said:
                text = f"waiting up to {wait_s:g} s (cluster.node_wait_s) for room: {missing}"
                self._recorder.on_event(RankEvent("waiting_for_nodes", text))
                self._recorder.on_stage(f"waits for nodes, {wait_s:g} s at most")
                said = True
            time.sleep(POLL_S)
        if said:
            waited_s = time.monotonic() - begin_s
            self._recorder.on_event(RankEvent("nodes_are_back", f"there is room again after {waited_s:.0f} s"))
        return None

    def _run_group(self, job: TrainJob, number: int) -> _Attempt:
        attempt = _Attempt(number)
        self._recorder.on_stage("ranks")
        try:
            group = Group(self._backend.start_group(job, number))
        except RankLost as error:
            attempt.troubles[error.rank] = Trouble(error.rank, TroubleKind.lost, 0, str(error))
            return attempt
        self.state = ControllerState.running
        with CleanUps() as ending:
            ending.callback(self._read_journals, job, group, attempt)
            ending.callback(self._tell_lost_owners)
            ending.callback(self._kill, group, attempt)
            try:
                self._announce(job, group, number)
                self._watch(job, group, attempt)
            except RankLost as error:
                attempt.troubles[error.rank] = Trouble(error.rank, TroubleKind.lost, 0, str(error))
        return attempt

    def _kill(self, group: Group, attempt: _Attempt) -> None:
        """End the group. If it has failed already, that error is reported, and not an error of this call."""
        try:
            group.kill()
        except Exception as error:
            if not attempt.troubles:
                raise
            self._recorder.on_event(RankEvent("kill_failed", f"the ranks could not be ended in order: {error}"))

    def _read_journals(self, job: TrainJob, group: Group, attempt: _Attempt) -> None:
        """Report what the driver had not fetched of killed ranks; a disk that fails does not end the run."""
        for rank in range(group.num_ranks):
            journal = journal_path(job.run_dir, rank, attempt.number)
            try:
                for report in read_journal(journal, after=attempt.num_reports.get(rank, 0)):
                    self._recorder.on_report(report)
                    attempt.num_events += len(report.events) if rank == 0 else 0
                journal.unlink(missing_ok=True)
            except OSError as error:
                self._recorder.on_event(RankEvent("journal_failed", f"{journal}: {error.strerror or error}"))

    def _announce(self, job: TrainJob, group: Group, number: int) -> None:
        homes = group.homes(self._cluster.start_timeout_s)
        ranks = [
            {"rank": home.rank, "pid": home.process.pid, "host": home.process.host, "network": dict(home.network)}
            for home in homes
        ]
        text = f"{len(ranks)} rank(s) started, their logs are in {log_path(job.run_dir, 0).parent}"
        self._recorder.on_event(RankEvent("group_started", text, {"attempt": number, "ranks": ranks}))

    def _watch(self, job: TrainJob, group: Group, attempt: _Attempt) -> None:
        """Until every rank has ended well, or one has not and the others have had a moment to say so too."""
        watch = Watch(self._cluster, group.num_ranks, time.monotonic())
        kills_before = num_oom_kills()
        trouble_s = stop_s = None
        while True:
            begin_s = time.monotonic()
            if self._stop_requested() and self.state is ControllerState.running:
                self.state = ControllerState.stopping
                group.request_stop()
                stop_s = begin_s
                self._recorder.on_event(RankEvent("stop_requested", "a signal was received: the run saves and stops"))
            beats = group.poll(POLL_S)
            now_s = time.monotonic()
            watch.hear(beats.statuses, now_s)
            for status in beats.statuses.values():
                self._take(status, attempt)
            if self._steering is not None:
                self._steer(self._steering, group)
            self._tell_stage(beats.statuses, attempt)
            self._tell_lost_owners()
            for rank, text in beats.lost.items():
                step = watch.step_of(rank)
                if (failure := cause_of_death(cause_path(job.run_dir, rank, attempt.number))) is not None:
                    text = f"{failure.message} [{failure.id}]"
                elif (kills := num_oom_kills() - kills_before) > 0:
                    text += f"; meanwhile the kernel of this machine killed {kills} process(es) because memory ran out"
                text = f"the process of rank {rank} ended after step {step}: {text}"
                attempt.troubles[rank] = Trouble(rank, TroubleKind.lost, step, text, failure)
            if len(attempt.results) == group.num_ranks:
                return
            if not attempt.troubles:
                hanging = (watch.late(now_s, stop_s) if stop_s is not None else []) or watch.troubles(now_s)
                if hanging:
                    attempt.troubles |= {trouble.rank: trouble for trouble in hanging}
                    self._save_stacks(job, group, attempt)
                    return
            elif trouble_s is None:
                trouble_s = now_s
            everybody = len(attempt.results) + len(attempt.troubles) == group.num_ranks
            if attempt.troubles and (everybody or (trouble_s is not None and now_s - trouble_s > GRACE_S)):
                return
            time.sleep(max(0.0, POLL_S - (time.monotonic() - begin_s)))

    def _judge(self, report: StepReport) -> list[RankEvent]:
        """What the steering says to a report. An error of the planner does not end a run that trains."""
        if self._steering is None:
            return []
        try:
            return self._steering.hear(report)
        except Exception as error:
            self._steering = None
            why = f"{type(error).__name__}: {error}"
            return [RankEvent("replan_failed", f"the run goes on, and its plan is not checked any more: {why}")]

    def _steer(self, steering: Steering, group: Group | None = None) -> None:
        """Pass on what the steering has decided since the last call."""
        if (record := steering.take_record()) is not None:
            self._recorder.on_plan(record)
        if group is not None and (new := steering.take_plan()) is not None:
            group.change_plan(new)

    def _tell_stage(self, statuses: Mapping[int, RankStatus], attempt: _Attempt) -> None:
        """Until the first step is done, say what rank 0 does; and how far it is in any step."""
        if 0 not in statuses or (stage := statuses[0].stage) is None or attempt.results:
            return
        text = "first step" if stage in FIRST_STEP else stage.value
        if text != attempt.stage and not attempt.num_reports.get(0):
            attempt.stage = text
            self._recorder.on_stage(text)
        part = statuses[0].part
        if part is not None and part != attempt.part:
            self._recorder.on_part(str(part) if stage is Stage.compute else f"{stage.value}, {part}")
        attempt.part = part

    def _tell_lost_owners(self) -> None:
        for event in self._backend.lost_owners():
            self._recorder.on_event(event)

    def _take(self, status: RankStatus, attempt: _Attempt) -> None:
        for report in status.reports:
            self._recorder.on_report(report)
            for event in self._judge(report):
                self._recorder.on_event(event)
            attempt.num_events += len(report.events) if status.rank == 0 else 0
        attempt.num_reports[status.rank] = status.num_reports
        if status.phase is RankPhase.finished and status.result is not None:
            attempt.results[status.rank] = status.result
        if status.phase is RankPhase.failed and status.failure is not None:
            failure, step = status.failure, status.step or 0
            text = f"rank {status.rank} failed after step {step}: {failure.error}: {failure.message} [{failure.id}]"
            attempt.troubles[status.rank] = Trouble(status.rank, TroubleKind.raised, step, text, failure)

    def _save_stacks(self, job: TrainJob, group: Group, attempt: _Attempt) -> None:
        # A silent rank is not asked: its node may be gone, and the others' stacks and the restart would wait for it.
        silent = {trouble.rank for trouble in attempt.troubles.values() if trouble.kind is TroubleKind.silent}
        stacks = group.stacks(set(range(group.num_ranks)) - silent, STACKS_TIMEOUT_S)
        path = Path(job.run_dir) / "logs" / f"stacks-attempt{attempt.number}.txt"
        missing = "the process does not answer\n"
        where = f"stacks of all ranks are in {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"=== rank {r}\n{stacks.get(r, missing)}\n" for r in range(group.num_ranks)))
        except OSError as error:
            where = f"{path} could not be written ({error.strerror})"
        text = "; ".join(trouble.text for trouble in attempt.troubles.values())
        self._recorder.on_event(RankEvent("rank_hung", f"{text}; {where}", {"path": str(path)}))

    def _ended(self, attempt: _Attempt) -> RunOutcome:
        self.state = ControllerState.ended
        results = tuple(attempt.results[rank] for rank in sorted(attempt.results))
        # What happened after the last report, as the last checkpoint, has travelled with the result.
        for event in list(results[0].stats.get("events", ()))[attempt.num_events :]:
            self._recorder.on_event(RankEvent(**event))
        stopped = any(result.outcome is RankOutcome.stopped for result in results)
        outcome = Outcome.stopped if stopped else Outcome.finished
        # Who computed, which engine moved the bytes and why, and how that is known: of every rank.
        ranks = [{key: value for key, value in each.stats.items() if key != "events"} for each in results]
        return RunOutcome(outcome, attempt.number, results, facts={**self._facts(), "ranks": ranks})

    def _failed(self, job: TrainJob, decision: Decision, attempt: _Attempt) -> RunOutcome:
        self.state = ControllerState.ended
        cause = decision.cause
        log = log_path(job.run_dir, cause.rank)
        self._say("run_failed", f"{cause.text}; {decision.why}; its log is {log}", decision)
        if decision.action is Action.abort and cause.failure is not None:
            kind = InputError if cause.failure.kind is FailureKind.input else MachineError
            raise kind(cause.failure.message, id=cause.failure.id)
        text = f"{cause.text} ({decision.why}; log: {log})"
        return RunOutcome(Outcome.failed, attempt.number, failure=text, facts=self._facts())

    def _say(self, kind: str, text: str, decision: Decision) -> None:
        cause = decision.cause
        facts = {"rank": cause.rank, "kind": cause.kind.value, "step": cause.step, "action": decision.action.value}
        facts |= {} if cause.failure is None else {"id": cause.failure.id.value}
        self._recorder.on_event(RankEvent(kind, text, facts))

    def _facts(self) -> Mapping[str, Any]:
        return dict(self._backend.facts) | {"failures": [cause.text for cause in self._causes]}
