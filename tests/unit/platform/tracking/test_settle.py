"""Runs whose process was killed: no point is lost, and the records say how the run ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.cli.main import main
from headrace.platform.tracking import settle as module
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_folder import read_json, read_metrics
from headrace.platform.tracking.run_owner import own_run_folder
from headrace.platform.tracking.settle import settle, settle_if_lost
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.json_lines import read_lines
from headrace.workers.actors.journal import ReportJournal, journal_path
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry.records import RankEvent, StepReport

Make = Callable[..., RunRecorder]
MakeReport = Callable[..., StepReport]
NUM_KILLS, NUM_STEPS = 20, 600


@pytest.mark.slow
def test_twenty_killed_drivers_lose_no_point(tmp_path: Path) -> None:
    words = [sys.executable, str(Path(__file__).with_name("kill_drivers.py")), str(tmp_path / "run")]
    words += [str(NUM_KILLS), str(NUM_STEPS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(NUM_KILLS)
    steps = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in steps] == [(s, 1.0 / s) for s in range(1, NUM_STEPS + 1)]
    events = [event["kind"] for event, _ in read_lines(tmp_path / "run" / "events.jsonl")]
    assert 0 < events.count("run_lost") <= NUM_KILLS  # some were killed before the run had begun again
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["outcome"], summary["last_step"]) == ("finished", NUM_STEPS)
    assert list((tmp_path / "run").rglob("reports-attempt*")) == []


def journal(run_dir: Path, rank: int, attempt: int, *reports: StepReport) -> None:
    with ReportJournal(journal_path(run_dir, rank, attempt)) as lines:
        for report in reports:
            lines.append(report)


def killed(make_recorder: Make, plan: MemoryPlan, *reports: StepReport) -> Path:
    """The folder of a run of two ranks whose driver has written these reports."""
    run = make_recorder(num_ranks=2)
    run.start("run: {}\n", plan, {"hardware": "cpu"})
    for report in reports:
        run.on_report(report)
    return run.run_dir


def history(run_dir: Path) -> list[tuple[int, float, int]]:
    return [(x["step"], x["perf/step_s"], x["num_ranks"]) for x in read_metrics(run_dir / "metrics.jsonl")]


def test_what_the_ranks_had_reported_is_added_once(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    said = (RankEvent("checkpoint_saved", "step 2 is saved"),)
    both = [make_report(step, rank, said if (step, rank) == (2, 0) else ()) for step in (1, 2) for rank in (0, 1)]
    run_dir = killed(make_recorder, plan, *both)
    late = (RankEvent("tier_drift", "the drive is slow"),)
    journal(run_dir, 0, 0, both[0], both[2], make_report(3, 0), make_report(4, 0, late))
    journal(run_dir, 1, 0, both[1], both[3], make_report(3, 1, **{"io/odd": float("nan")}))
    settle_if_lost(run_dir)
    assert history(run_dir) == [(1, 1.5, 2), (2, 1.5, 2), (3, 1.5, 2), (4, 0.5, 1)]
    events = [event["kind"] for event, _ in read_lines(run_dir / "events.jsonl")]
    assert events == ["checkpoint_saved", "tier_drift", "run_lost"]
    summary = read_json(run_dir / "summary.json")
    assert (summary["outcome"], summary["last_step"], summary["num_ranks"]) == ("lost", 4, 2)
    assert summary["facts"] == {"hardware": "cpu"}
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    settle_if_lost(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert list(run_dir.rglob("reports-attempt*")) == []


def test_a_group_that_had_gone_back_takes_back_the_steps_of_the_one_before(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run_dir = killed(make_recorder, plan, *(make_report(step, rank) for step in (1, 2, 3, 4) for rank in (0, 1)))
    for rank in (0, 1):
        journal(run_dir, rank, 1, *(make_report(step, rank, **{"perf/step_s": 7.0 + rank}) for step in (2, 3)))
    settle_if_lost(run_dir)
    assert history(run_dir) == [(1, 1.5, 2), (2, 8.0, 2), (3, 8.0, 2)]
    assert [x["step"] for x in read_metrics(run_dir / "metrics.jsonl") if x.get("first_of_start")] == [1, 2]


def test_a_run_that_goes_on_is_left_alone(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan) -> None:
    run_dir = killed(make_recorder, plan)
    journal(run_dir, 0, 0, make_report(1, 0))
    with own_run_folder(run_dir):
        settle_if_lost(run_dir)
    assert history(run_dir) == []
    assert read_json(run_dir / "summary.json")["outcome"] == "running"


def test_a_rank_that_outlives_its_driver_is_waited_for(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = killed(make_recorder, plan)
    monkeypatch.setattr(module, "RANKS_END_S", 0.01)
    with ReportJournal(journal_path(run_dir, 0, 0)) as lines:
        lines.append(make_report(1, 0))
        with pytest.raises(InputError, check=has_id(ErrorId.run_folder_in_use)):
            settle(run_dir)
    settle(run_dir)
    assert history(run_dir) == [(1, 0.5, 1)]


def test_the_verb_report_says_lost(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = killed(make_recorder, plan)
    journal(run_dir, 0, 0, make_report(1, 0))
    assert main(["report", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["outcome"] == "lost"
    assert '<span class="badge failed">lost</span>' in (run_dir / "report.html").read_text()
