"""Signals to a driver of plain processes: what is saved, and what is left."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from headrace.workers.train.checkpoint_folder import CheckpointFolder


def long_job(job):
    return job(train={"steps": 100_000}, memory="offload_ssd")


def test_the_second_ctrl_c_ends_at_once_without_a_checkpoint(job, drive) -> None:
    running = long_job(job)
    with drive(running, "inline") as driver:
        driver.send_signal(signal.SIGINT)
        driver.send_signal(signal.SIGTERM)  # another signal, for two of a kind may arrive as one
        assert driver.wait(120) not in (0, 3)
    assert not any((Path(running.run_dir) / "tiers").glob("*"))
    assert CheckpointFolder(Path(running.run_dir) / "checkpoints").committed_steps() in ([], None, [0])


def test_a_killed_driver_leaves_no_process_and_no_slab(job, drive, tmp_path: Path) -> None:
    with drive(long_job(job), "inline") as driver:
        ranks = children(driver.pid)
        slabs = [*Path("/dev/shm").glob(f"headrace-*-{driver.pid}-*.slab"), *(tmp_path / "tiers").glob("*.slab")]
        assert len(ranks) >= 2
        assert len(slabs) == 2
        driver.kill()
        driver.wait()
    until_s = time.monotonic() + 120
    while (alive(ranks) or any(slab.exists() for slab in slabs)) and time.monotonic() < until_s:
        time.sleep(0.1)
    assert not alive(ranks)
    assert not [slab for slab in slabs if slab.exists()]


def children(pid: int) -> list[int]:
    """Ranks of a driver."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"actors.pipe" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pids: list[int]) -> list[int]:
    """Those that still run."""
    return [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()]
