"""The same controller over plain processes: faults and ends that need no Ray."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.platform.control.states import Outcome
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_folder import read_metrics
from headrace.storage.core.errors import InputError
from headrace.workers.telemetry.records import Stage, StepReport
from headrace.workers.train.checkpoint_folder import CheckpointFolder

NUM_STEPS = 70


def test_a_rank_that_is_stopped_is_found_by_its_silence_and_the_group_goes_on_from_the_checkpoint(job, start) -> None:
    hurt: list[int] = []

    def stop_rank(run, report) -> None:
        if getattr(report, "step", 0) >= 4 and not hurt:
            hurt.append(run.pid(1))
            os.kill(hurt[0], signal.SIGSTOP)

    frozen = job(train={"steps": 8, "micro_batches": 4}, checkpoint={"every": 2})
    run = start(frozen, "inline", num_workers=2, meddle=stop_rank, heartbeat_timeout_s=15.0)
    assert (run.outcome.outcome, run.outcome.restarts) == (Outcome.finished, 1)
    hung = run.of_kind("rank_hung")[0].text
    assert "rank 1 has not answered" in hung
    assert any(stage.value in hung for stage in Stage)
    stacks = (Path(frozen.run_dir) / "logs" / "stacks-attempt0.txt").read_text()
    assert "=== rank 1\nthe process does not answer" in stacks
    assert "session.py" in stacks  # where rank 0 waits for it
    assert not Path(f"/proc/{hurt[0]}").exists()
    assert len(run.curve) == 2 * 8  # and steps that were done twice were the same twice
    assert len(run.reports) > 2 * 8


def test_bad_input_met_by_a_rank_ends_the_run_at_once(job, start) -> None:
    with pytest.raises(InputError, match="vocab"):
        start(job(model={"vocab_size": 7}), "inline", num_workers=2)


def test_a_run_goes_on_over_a_full_disk_and_its_records_are_whole_later(job, start, mount_tmpfs) -> None:
    """The real ranks; everything that is written down lies on a disk that is full from step 3 on.

    Reports come late on a busy machine: the ranks may be far ahead of the one that makes room again.
    """
    disk = mount_tmpfs("size=24m")
    training = replace(job(train={"steps": NUM_STEPS}, checkpoint={"every": 10}), run_dir=str(disk / "run"))
    recorder = RunRecorder(training.run_dir, TrackingConfig(mlflow=False), num_ranks=2, num_steps=NUM_STEPS)
    recorder.start("run: {}\n", training.plan, {})
    ballast = disk / "ballast"

    def meddle(run, report) -> None:
        if not isinstance(report, StepReport):
            return
        recorder.on_report(report)
        if report.step == 3 and not ballast.exists():
            with suppress(OSError), ballast.open("wb", 0) as file:
                while True:
                    file.write(b"x" * 4096)
        if report.step == 35:
            ballast.unlink(missing_ok=True)

    run = start(training, "inline", num_workers=2, meddle=meddle)
    recorder.finish(run.outcome.outcome, run.outcome.facts)
    assert (run.outcome.outcome, run.outcome.restarts) == (Outcome.finished, 0)
    assert [(x["step"], x["num_ranks"]) for x in read_metrics(disk / "run" / "metrics.jsonl")] == [
        (step, 2) for step in range(1, NUM_STEPS + 1)
    ]
    assert run.of_kind("checkpoint_failed") or any(
        event.kind == "checkpoint_failed" for report in run.reports for event in report.events
    )
    assert CheckpointFolder(disk / "run" / "checkpoints").committed_steps()[0] == NUM_STEPS
