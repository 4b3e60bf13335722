"""The same controller over plain processes: faults and ends that need no Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from headrace.platform.control.states import Outcome
from headrace.storage.core.errors import InputError
from headrace.workers.telemetry.records import Stage


def test_a_rank_that_is_stopped_is_found_by_its_silence_and_the_group_goes_on_from_the_checkpoint(job, start) -> None:
    hurt: list[int] = []

    def stop_rank(run, report) -> None:
        if getattr(report, "step", 0) >= 4 and not hurt:
            hurt.append(run.pid(1))
            os.kill(hurt[0], signal.SIGSTOP)

    frozen = job(train={"steps": 12, "micro_batches": 4}, checkpoint={"every": 2})
    run = start(frozen, "inline", num_workers=2, meddle=stop_rank, heartbeat_timeout_s=4.0)
    assert (run.outcome.outcome, run.outcome.restarts) == (Outcome.finished, 1)
    hung = run.of_kind("rank_hung")[0].text
    assert "rank 1 has not answered" in hung
    assert any(stage.value in hung for stage in Stage)
    stacks = (Path(frozen.run_dir) / "logs" / "stacks-attempt0.txt").read_text()
    assert "=== rank 1\nthe process does not answer" in stacks
    assert "session.py" in stacks  # where rank 0 waits for it
    assert not Path(f"/proc/{hurt[0]}").exists()
    assert len(run.curve) == 2 * 12  # and steps that were done twice were the same twice
    assert len(run.reports) > 2 * 12


def test_bad_input_met_by_a_rank_ends_the_run_at_once(job, start) -> None:
    with pytest.raises(InputError, match="vocab"):
        start(job(model={"vocab_size": 7}), "inline", num_workers=2)
