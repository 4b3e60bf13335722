from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.platform.tracking import recorder as recorder_module
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_folder import read_json, read_metrics
from headrace.platform.tracking.transfers import merge_transfers, moved_bytes
from headrace.storage.core.errors import HeadraceError
from headrace.storage.core.json_lines import read_lines
from headrace.storage.core.records import Direction, Medium, TransferRecord
from headrace.storage.transfer_log import TransferLog
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent, StepReport

Make = Callable[..., RunRecorder]
MakeReport = Callable[..., StepReport]


def write_log(run_dir: Path, rank: int, num: int, name: str = "transfers.parquet") -> None:
    log = TransferLog(rank)
    for i in range(num):
        log.append(TransferRecord(f"s{i}.m0.l0.layer_input.c0", 4096, Medium.host, Direction.store, i, i, i + 0.5))
        log.append(TransferRecord(f"s{i}.m0.l0.layer_input.c0", 4096, Medium.host, Direction.load, i, i, i + 0.9))
    log.write_parquet(run_dir / "ranks" / f"rank{rank}" / name)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has its own tests."""
    monkeypatch.setattr(recorder_module, "_write_report", lambda run_dir: None)


def test_the_run_folder(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan) -> None:
    run = make_recorder(num_ranks=2)
    run.start("a: 1\n", plan, {"hardware": "cpu"})
    write_log(run.run_dir, 0, 3)
    write_log(run.run_dir, 1, 3)
    for step in (1, 2):
        for rank in (1, 0):
            run.on_report(make_report(step, rank))
    words = run.finish("finished", {"dashboard_url": "http://x", "ray_started_by_run": True})
    assert (run.run_dir / "config.yaml").read_text() == "a: 1\n"
    assert MemoryPlan.from_dict(read_json(run.run_dir / "plan.json")) == plan
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    first = {key: lines[0][key] for key in ("step", "loss", "grad_norm", names.LOSS_TRAIN, names.STEP_S, "num_ranks")}
    assert first == {
        "step": 1,
        "loss": 10.0,
        "grad_norm": 1.0,
        names.LOSS_TRAIN: 10.0,
        names.STEP_S: 1.5,
        "num_ranks": 2,
    }
    assert list(lines[0])[:3] == ["step", "loss", "grad_norm"]
    assert ["first_of_start" in line for line in lines] == [True, False]
    summary = read_json(run.run_dir / "summary.json")
    assert summary["outcome"] == "finished"
    assert summary["last_step"] == 2
    assert summary["moved_bytes"] == {"host": {"store": 6 * 4096, "load": 6 * 4096}}
    assert summary["facts"] == {"hardware": "cpu", "dashboard_url": "http://x", "ray_started_by_run": True}
    assert str(run.run_dir) in words
    assert "http://x" not in words  # that Ray has ended with the run
    assert run.finish("failed", {}) == words, "a second end changes nothing"
    assert read_json(run.run_dir / "summary.json")["outcome"] == "finished"


def test_the_folder_says_how_far_the_step_at_hand_is_until_the_run_has_ended(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run = make_recorder(num_ranks=1)
    run.start("", plan, {})
    run.on_report(make_report(1, 0))
    for number in (1, 2):  # the second one comes too soon to be written
        run.on_part(f"stage 2/2, chunk {number}/64")
    there = read_json(run.run_dir / "step_part.json")
    assert (there["step"], there["part"]) == (2, "stage 2/2, chunk 1/64")
    run.finish("finished", {})
    assert not (run.run_dir / "step_part.json").exists()


def test_a_step_is_written_when_its_last_rank_has_reported(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run = make_recorder(num_ranks=2)
    run.start("", plan, {})
    path = run.run_dir / "metrics.jsonl"
    run.on_report(make_report(1, 1))
    assert read_metrics(path) == []
    run.on_report(make_report(1, 0))
    assert [line["step"] for line in read_metrics(path)] == [1]
    run.on_report(make_report(2, 0))
    run.finish("failed", {})
    assert [(line["step"], line["num_ranks"]) for line in read_metrics(path)] == [(1, 2), (2, 1)]


@pytest.mark.parametrize("told", [True, False], ids=["controller_says_so", "seen_from_the_steps"])
def test_a_group_that_went_back_writes_its_steps_again(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, told: bool
) -> None:
    run = make_recorder(num_ranks=2)
    run.start("", plan, {})
    for step in (1, 2, 3):
        for rank in (0, 1):
            run.on_report(make_report(step, rank))
    run.on_report(make_report(4, 0))  # rank 1 is killed before it reports; the checkpoint is of step 2
    again = (RankEvent("resumed", "resumed after step 2"),)
    if told:
        run.on_event(RankEvent("group_started", "group 1 starts"))
    # All that rank 1 has to say comes first when it was told: nothing of the old group may complete its steps.
    order = [(3, 1), (4, 1), (3, 0), (4, 0)] if told else [(3, 1), (3, 0), (4, 1), (4, 0)]
    for step, rank in order:
        run.on_report(make_report(step, rank, again if (step, rank) == (3, 0) else (), extra=7.0))
    run.finish("finished", {})
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert [(line["step"], line.get("extra"), line["num_ranks"]) for line in lines] == [
        (1, None, 2),
        (2, None, 2),
        (3, 7.0, 2),
        (4, 7.0, 2),
    ]
    assert [line["step"] for line in lines if line.get("first_of_start")] == [1, 3]
    assert [event["kind"] for event, _ in read_lines(run.run_dir / "events.jsonl")] == ["group_started", "resumed"][
        not told :
    ]


def test_a_report_that_was_lost_does_not_undo_later_steps(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run = make_recorder(num_ranks=2)
    run.start("", plan, {})
    run.on_report(make_report(1, 0))
    for rank in (0, 1):
        run.on_report(make_report(2, rank))
    run.finish("finished", {})
    assert [(x["step"], x["num_ranks"]) for x in read_metrics(run.run_dir / "metrics.jsonl")] == [(1, 1), (2, 2)]


def test_a_resumed_run_appends_and_keeps_the_configuration_before(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    for text, steps in (("lr: 1\n", (1, 2, 3)), ("lr: 2\n", (3, 4)), ("lr: 2\n", (5,))):
        run = make_recorder()
        run.start(text, plan, {})
        for step in steps:
            run.on_report(make_report(step))
        write_log(run.run_dir, 0, 2)
        run.finish("stopped", {})
    assert [line["step"] for line in read_metrics(run.run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert (run.run_dir / "config-1.yaml").read_text() == "lr: 1\n"
    assert not (run.run_dir / "config-2.yaml").exists()
    kinds = [event["kind"] for event, _ in read_lines(run.run_dir / "events.jsonl")]
    assert kinds == ["config_drift"]
    assert moved_bytes(run.run_dir / "transfers.parquet")["host"]["store"] == 3 * 2 * 4096


def test_a_killed_start_leaves_its_transfers_to_the_next_one(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run = make_recorder()
    run.start("", plan, {})
    write_log(run.run_dir, 0, 2)
    write_log(run.run_dir, 0, 1, ".transfers-rank0-0.parquet")
    again = make_recorder()
    again.start("", plan, {})
    write_log(run.run_dir, 0, 4, "transfers-attempt1.parquet")
    again.finish("finished", {})
    assert moved_bytes(run.run_dir / "transfers.parquet")["host"]["store"] == 7 * 4096
    assert list((run.run_dir / "ranks").rglob("*.parquet")) == []


def test_a_damaged_transfer_log_is_named_and_costs_only_itself(tmp_path: Path) -> None:
    write_log(tmp_path, 0, 2)
    damaged = tmp_path / "ranks" / "rank1" / "transfers.parquet"
    damaged.parent.mkdir()
    damaged.write_bytes(b"PAR1 and no more")
    with pytest.raises(HeadraceError, match="rank1"):
        merge_transfers(tmp_path)
    assert moved_bytes(tmp_path / "transfers.parquet")["host"]["store"] == 2 * 4096
    assert damaged.exists()


def test_no_record_turns_a_finished_run_into_a_failed_one(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run_dir: Path) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(recorder_module, "_write_report", broken)
    run = make_recorder()
    run.start("", plan, {})
    run.on_report(make_report(1))
    (run.run_dir / "ranks" / "rank0").mkdir(parents=True)
    (run.run_dir / "ranks" / "rank0" / "transfers.parquet").write_text("rubbish")
    assert "run finished: 1 of 10 steps" in run.finish("finished", {})
    texts = [event["text"] for event, _ in read_lines(run.run_dir / "events.jsonl")]
    assert any("no font" in text for text in texts)
    assert any("rank0" in text for text in texts)


def test_not_finite_values_reach_the_file_as_null(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan
) -> None:
    run = make_recorder()
    run.start("", plan, {"odd": float("nan")})
    run.on_report(make_report(1, **{names.EXPOSED_PCT: float("nan"), names.LOSS_TRAIN: float("inf")}))
    run.finish("failed", {})
    text = (run.run_dir / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["loss"] is None


def test_a_step_costs_less_than_a_millisecond(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan) -> None:
    run = make_recorder()
    run.start("", plan, {})
    reports = [make_report(step, **{f"x/{i}": 1.5 for i in range(25)}) for step in range(1, 2_001)]
    begin = time.process_time()
    for report in reports:
        run.on_report(report)
    assert (time.process_time() - begin) / len(reports) < 1e-3
    run.finish("finished", {})
    assert len(read_metrics(run.run_dir / "metrics.jsonl")) == 2_000
