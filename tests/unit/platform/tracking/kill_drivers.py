"""Kills the driver of one run again and again: python kill_drivers.py RUN_DIR NUM_KILLS NUM_STEPS.

Drivers and ranks are forked from this process: the real controller, recorder, journal and pipes, with a stand-in for
the training itself that saves after every step. The last driver runs to the end. Prints how many drivers were killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headrace.platform.control import controller, inline
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.controller import Controller
from headrace.platform.control.starting import Slabs
from headrace.platform.tracking import recorder as recorder_module
from headrace.platform.tracking.config import Progress, TrackingConfig
from headrace.platform.tracking.provenance import provenance
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_owner import own_run_folder
from headrace.storage.config import TiersConfig
from headrace.workers.actors.pipe import serve
from headrace.workers.actors.rank import RankShell
from headrace.workers.telemetry.records import RankOutcome, RankResult, StepReport
from headrace.workers.train.config import DeviceKind

STEP_S = 0.001


class Forked:
    """A rank's process, in place of subprocess.Popen."""

    def __init__(self, words: list[str], **options: Any) -> None:
        rank, fd = int(words[-2]), int(words[-1])
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, fd)
            os.closerange(fd + 1, 256)
            serve(RankShell(rank, run=train), Connection(fd))
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def step_of(run_dir: Path) -> int:
    """The last step that is saved."""
    saved = run_dir / "saved"
    return int(saved.read_text()) if saved.exists() else 0


def wait_for_step(run_dir: Path, pid: int, step: int) -> None:
    """Until the driver's rank has saved a step, or the driver has ended."""
    while step_of(run_dir) < step and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def train(job: Any, context: Any, *, on_step: Any, should_stop: Any, on_stage: Any, **_: Any) -> RankResult:
    """Steps from where the run is; each is reported, then saved."""
    saved, step = Path(job.run_dir) / "saved", step_of(Path(job.run_dir))
    while step < job.num_steps:
        step += 1
        time.sleep(STEP_S)
        on_step(StepReport(step, 0, {"loss/train": 1.0 / step, "perf/step_s": random.random()}))
        saved.with_suffix(".new").write_text(str(step))
        saved.with_suffix(".new").replace(saved)
    return RankResult(0, RankOutcome.finished, step)


def drive(run_dir: Path, num_steps: int) -> None:
    """One driver from start to end."""
    random.seed()
    job: Any = SimpleNamespace(run_dir=str(run_dir), num_steps=num_steps, tiers=TiersConfig())
    cluster = ClusterConfig(launcher=Launcher.inline, num_workers=1)
    with own_run_folder(run_dir):
        settings = TrackingConfig(mlflow=False, progress=Progress.off)
        recorder = RunRecorder(run_dir, settings, num_ranks=1, num_steps=num_steps)
        recorder.start("run: {}\n", {}, {})
        backend = inline.InlineBackend(cluster, DeviceKind.cpu, Slabs(0, 0, ()), run="killed")
        outcome = Controller(backend, cluster, recorder, stop_requested=lambda: False).run(job)
        recorder.finish(outcome.outcome, {})


def main(run_dir: Path, num_kills: int, num_steps: int) -> int:
    """Kill drivers at random moments."""
    inline.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=None, TimeoutExpired=TimeoutError)  # type: ignore
    controller.POLL_S = 0.05
    recorder_module._write_report = lambda run_dir: None
    provenance()  # read once, and inherited
    num_killed = 0
    for number in range(num_kills + 1):
        pid = os.fork()
        if pid == 0:
            drive(run_dir, num_steps)
            os._exit(0)
        if number < num_kills:
            wait_for_step(run_dir, pid, step_of(run_dir) + random.randrange(num_steps // (3 * num_kills)))
            time.sleep(random.uniform(0.0, controller.POLL_S))
            os.kill(pid, signal.SIGKILL)
        num_killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    print(num_killed)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
