"""Signals to a driver of plain processes: what is saved, and what is left."""

from __future__ import annotations

import signal
from pathlib import Path

from headrace.workers.train.checkpoint_folder import CheckpointFolder


def long_job(job):
    return job(train={"steps": 100_000}, memory="offload_ssd")


def test_the_second_ctrl_c_ends_at_once_without_a_checkpoint(job, drive) -> None:
    running = long_job(job)
    with drive(running, "inline") as driver:
        driver.send_signal(signal.SIGINT)
        driver.send_signal(signal.SIGTERM)  # another signal, for two of a kind may arrive as one
        assert driver.wait(600) not in (0, 3)
    assert not any((Path(running.run_dir) / "tiers").glob("*"))
    assert CheckpointFolder(Path(running.run_dir) / "checkpoints").committed_steps() in ([], None, [0])
