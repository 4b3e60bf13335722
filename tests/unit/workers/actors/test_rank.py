"""The shell round a rank: heartbeats while it trains, its ends, its stacks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.storage.config import HostTierConfig, TiersConfig
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.tiers.memory_limits import MemoryLimit
from headrace.workers.actors import rank as module
from headrace.workers.actors.journal import ReportJournal
from headrace.workers.actors.rank import RankShell, drop_launcher_variables
from headrace.workers.actors.status import FailureKind, RankPhase
from headrace.workers.job import RankContext
from headrace.workers.telemetry.records import RankOutcome, RankResult, Stage, StepPart, StepReport


@pytest.fixture(autouse=True)
def keep_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "redirect_output", lambda path, title: None)


def until(shell: RankShell, phase: RankPhase) -> Any:
    import time

    reports: tuple[StepReport, ...] = ()
    for _ in range(6000):
        status = shell.poll()
        reports += status.reports
        if status.phase is phase:
            return status, reports
        time.sleep(0.01)
    raise AssertionError(f"still {status.phase}")


def begin(shell: RankShell, folder: Path) -> None:
    job: Any = SimpleNamespace(run_dir=str(folder), tiers=TiersConfig())
    shell.start(job, RankContext())


def train(job, context, *, on_step, should_stop, on_stage, **_) -> RankResult:
    """Steps until asked to stop, at least one."""
    step = 0
    while step == 0 or not should_stop():
        step += 1
        on_stage(Stage.compute)
        on_step(StepReport(step, 0, {"loss/train": 1.0 / step}))
    return RankResult(0, RankOutcome.stopped, step)


def test_heartbeats_carry_every_report_once_and_a_stop_is_heard(tmp_path: Path) -> None:
    seen: list[StepReport] = []
    shell = RankShell(0, run=train, also_on_report=seen.append)
    assert shell.poll().phase is RankPhase.waiting
    begin(shell, tmp_path)
    early = shell.poll()
    shell.request_stop()
    status, reports = until(shell, RankPhase.finished)
    every = early.reports + reports
    assert [report.step for report in every] == list(range(1, status.result.last_step + 1))
    assert list(every) == seen
    assert status.num_reports == len(every)
    assert status.progress == 2 * len(every)
    assert status.stage is Stage.compute


def test_a_poll_is_heard_by_the_guard_and_a_rank_without_a_limit_has_none(tmp_path: Path, monkeypatch) -> None:
    heard: list[float] = []

    def guard(timeout_s: float) -> Any:
        heard.append(timeout_s)
        return SimpleNamespace(heard=lambda: heard.append(0.0))

    monkeypatch.setattr(module, "CutOffGuard", guard)
    for limit_s, words in ((None, []), (60.0, [60.0, 0.0])):
        shell = RankShell(0, run=train)
        shell.request_stop()
        job: Any = SimpleNamespace(run_dir=str(tmp_path), tiers=TiersConfig())
        shell.start(job, RankContext(poll_timeout_s=limit_s))
        assert shell.home().network["GLOO_SOCKET_IFNAME"]
        until(shell, RankPhase.finished)
        assert heard[:2] == words


def test_parts_of_a_step_are_signs_of_life(tmp_path: Path) -> None:
    parts = [StepPart(2, 2, number, 2, "chunk") for number in (1, 2)]

    def long_step(job, context, *, on_step, should_stop, on_stage, **_) -> RankResult:
        on_stage(Stage.compute)
        for part in parts:
            on_stage(Stage.compute, part)
        return RankResult(0, RankOutcome.finished, 0)

    shell = RankShell(0, run=long_step)
    begin(shell, tmp_path)
    status, _ = until(shell, RankPhase.finished)
    assert (status.progress, status.part) == (3, parts[-1])


def test_an_exception_is_sorted_and_keeps_its_trace(tmp_path: Path, capsys) -> None:
    def broken(job, context, *, on_step, should_stop, on_stage, **_) -> RankResult:
        raise InputError("data.seq_len=7: wrong")

    shell = RankShell(0, run=broken)
    begin(shell, tmp_path)
    status, _ = until(shell, RankPhase.failed)
    assert (status.failure.kind, status.failure.error) == (FailureKind.input, "InputError")
    assert status.failure.message == "data.seq_len=7: wrong"
    assert "in broken" in status.failure.trace
    assert "in broken" in capsys.readouterr().err


def test_an_exception_keeps_its_text_where_the_journal_cannot_be_closed(tmp_path: Path, monkeypatch) -> None:
    def broken(job, context, *, on_step, should_stop, on_stage, **_) -> RankResult:
        raise InputError("the first error")

    def leave(self, kind, error, tb) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ReportJournal, "__exit__", leave)
    shell = RankShell(0, run=broken)
    begin(shell, tmp_path)
    status, _ = until(shell, RankPhase.failed)
    assert status.failure.message == "the first error"
    assert "then, while cleaning up: OSError: [Errno 30] Read-only file system" in status.failure.trace


def test_stacks_show_where_the_training_thread_is(tmp_path: Path) -> None:
    import threading

    inside, gate = threading.Event(), threading.Event()

    def waits_here(job, context, *, on_step, should_stop, on_stage, **_) -> RankResult:
        inside.set()
        gate.wait()
        return RankResult(0, RankOutcome.finished, 0)

    shell = RankShell(0, run=waits_here)
    begin(shell, tmp_path)
    assert inside.wait(600)
    assert "waits_here" in shell.stacks()
    gate.set()
    until(shell, RankPhase.finished)


def test_variables_of_other_launchers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert {"SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} <= set(drop_launcher_variables())
    assert "SLURM_PROCID" not in os.environ


def low(grows: bool) -> MemoryLimit:
    return MemoryLimit(400 << 20, "limit x")


def test_a_rank_that_runs_out_of_host_memory_saves_and_has_failed(tmp_path: Path, capsys) -> None:
    shell = RankShell(0, run=train, look=low)
    begin(shell, tmp_path)
    status, reports = until(shell, RankPhase.failed)
    assert (status.failure.kind, status.failure.id) == (FailureKind.final, ErrorId.host_memory_low)
    assert f"saved step {reports[-1].step}" in status.failure.message
    assert "400 MiB left by limit x" in status.failure.message


def test_a_rank_that_was_asked_to_stop_has_stopped_whatever_memory_is_left(tmp_path: Path) -> None:
    shell = RankShell(0, run=train, look=low)
    shell.request_stop()
    begin(shell, tmp_path)
    status, _ = until(shell, RankPhase.finished)
    assert status.result.outcome is RankOutcome.stopped


def test_memory_that_grows_is_guarded_by_control_groups_alone(tmp_path: Path) -> None:
    asked: list[bool] = []

    def look(grows: bool) -> MemoryLimit:
        asked.append(grows)
        return low(grows)

    tiers = TiersConfig(host=HostTierConfig(memory_grows=True, budget_gib=1.0))
    job: Any = SimpleNamespace(run_dir=str(tmp_path), tiers=tiers)
    shell = RankShell(0, run=train, look=look)
    shell.start(job, RankContext())
    until(shell, RankPhase.failed)
    assert set(asked) == {True}


def test_a_rank_that_cannot_begin_has_failed(tmp_path: Path) -> None:
    shell = RankShell(0, run=lambda *args, **options: None)
    shell.start(SimpleNamespace(run_dir=str(tmp_path)), RankContext())  # a job without tiers
    status, _ = until(shell, RankPhase.failed)
    assert status.failure is not None
