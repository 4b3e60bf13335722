"""One rank behind a few calls that all return at once: start, poll, stop, stacks. A plain object: an actor or a pipe
is a thin shell round it. No Ray."""

from __future__ import annotations

import faulthandler
import functools
import io
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.owners import this_process
from headrace.storage.tiers.memory_limits import MemoryLimit, memory_left
from headrace.workers.actors.cut_off import CutOffGuard
from headrace.workers.actors.journal import ReportJournal, journal_path
from headrace.workers.actors.memory_guard import MemoryGuard, cause_path
from headrace.workers.actors.net import use_interface
from headrace.workers.actors.status import RankFailure, RankHome, RankPhase, RankStatus
from headrace.workers.job import NewPlan, RankContext, TrainJob
from headrace.workers.telemetry.describe import describe
from headrace.workers.telemetry.records import OnStep, RankOutcome, RankResult, Stage, StepPart, StepReport
from headrace.workers.train.allocator import set_allocator
from headrace.workers.train.config import DeviceKind

# An MPI-aware library that finds these believes that it was started by that launcher, and waits for the others.
LAUNCHER_PREFIXES = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MPI_", "HYDRA_")
RunRank = Callable[..., RankResult]
OnReport = Callable[[StepReport], None]


class RankShell:
    """Runs one rank in a thread, so that heartbeats are answered while it trains.

    Args:
        rank: of the process.
        run: `workers.train.session.run_rank`, or a stand-in.
        also_on_report: called for every step, from the training thread.
        look: says how much host memory is left.
    """

    def __init__(
        self,
        rank: int,
        *,
        run: RunRank | None = None,
        also_on_report: OnReport | None = None,
        look: Callable[..., MemoryLimit] = memory_left,
    ) -> None:
        drop_launcher_variables()
        self.rank = rank
        self._run, self._also, self._look = run, also_on_report, look
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._new_plan: NewPlan | None = None
        self._reports: list[StepReport] = []
        self._num_reports = self._progress = 0
        self._step: int | None = None
        self._phase = RankPhase.waiting
        self._stage: Stage | None = None
        self._part: StepPart | None = None
        self._result: RankResult | None = None
        self._failure: RankFailure | None = None
        self._network: Mapping[str, str] = {}
        self._cut_off: CutOffGuard | None = None

    def home(self) -> RankHome:
        """Where this process is."""
        return RankHome(self.rank, this_process(), self._network)

    def start(self, job: TrainJob, context: RankContext) -> None:
        """Begin to train. Output of the process goes to the rank's log file from here on.

        Raises:
            InputError, MachineError: there is no interface to the other ranks, as `use_interface`.
        """
        redirect_output(log_path(job.run_dir, context.rank), f"rank {context.rank} attempt {context.attempt}")
        self._network = use_interface(context.master_addr, context.interface)
        if context.poll_timeout_s is not None:
            self._cut_off = CutOffGuard(context.poll_timeout_s)
        if context.device == DeviceKind.cuda.value:
            set_allocator()
        self._phase = RankPhase.running
        thread = threading.Thread(target=self._train, args=(job, context), name=f"rank{context.rank}", daemon=True)
        thread.start()

    def poll(self) -> RankStatus:
        """How the rank is, and its reports since the last call."""
        if self._cut_off is not None:
            self._cut_off.heard()
        with self._lock:
            reports, self._reports = tuple(self._reports), []
            return RankStatus(
                self.rank,
                self._phase,
                self._progress,
                self._step,
                self._num_reports,
                reports,
                self._result,
                self._failure,
                self._stage,
                self._part,
            )

    def request_stop(self) -> None:
        """Ask the rank to save and end after the step it is in."""
        self._stop.set()

    def change_plan(self, new: NewPlan) -> None:
        """Give the rank a plan to change to when all ranks have it."""
        self._new_plan = new

    def stacks(self) -> str:
        """Where every thread of the process is now."""
        with open(os.memfd_create("stacks"), "w+") as file:  # the disk may be full
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read()

    def _train(self, job: TrainJob, context: RankContext) -> None:
        place = (job.run_dir, context.rank, context.attempt)
        try:
            look = functools.partial(self._look, grows=job.tiers.host.memory_grows)
            with CleanUps() as closing:
                journal = closing.enter_context(ReportJournal(journal_path(*place)))
                guard = closing.enter_context(MemoryGuard(look, cause_path(*place)))
                result = self._runner()(
                    job,
                    context,
                    on_step=self._on_step(journal),
                    should_stop=lambda: self._stop.is_set() or guard.is_low,
                    newest_plan=lambda: self._new_plan,
                    on_stage=self._on_stage,
                )
            if guard.is_low and result.outcome is RankOutcome.stopped and not self._stop.is_set():
                raise guard.saved(result.last_step)
        except BaseException as error:
            trace = traceback.format_exc()
            print(trace, file=sys.stderr, flush=True)
            with self._lock:
                self._phase, self._failure = RankPhase.failed, RankFailure.of(error, trace)
        else:
            with self._lock:
                self._phase, self._result = RankPhase.finished, result

    def _runner(self) -> RunRank:
        if self._run is not None:
            return self._run
        from headrace.workers.train.session import run_rank  # torch is imported in the thread, not before `home`

        return run_rank

    def _on_step(self, journal: ReportJournal) -> OnStep:
        def on_step(report: StepReport) -> None:
            journal.append(report)
            print(step_words(report), flush=True)
            with self._lock:
                self._reports.append(report)
                self._num_reports += 1
                self._progress += 1
                self._step = report.step
            if self._also is not None:
                self._also(report)

        return on_step

    def _on_stage(self, stage: Stage, part: StepPart | None = None) -> None:
        with self._lock:
            self._progress += 1
            self._stage, self._part = stage, part


def step_words(report: StepReport) -> str:
    """A step in one line of a log."""
    return f"{time.strftime('%H:%M:%S')} step {report.step}  {describe(report.metrics)}"


def log_path(run_dir: str | Path, rank: int) -> Path:
    """The rank's log file; a restarted rank appends to it."""
    return Path(run_dir) / "logs" / f"rank{rank}.log"


class _Output(io.FileIO):
    """Standard output of a rank: what does not fit on a full disk is left out, and printing never fails."""

    def write(self, data: Any) -> int:
        """Write what the disk takes; says that all was written."""
        with suppress(OSError):
            super().write(data)
        return memoryview(data).nbytes


def redirect_output(path: Path, title: str) -> None:
    """Send what this process prints, C code included, to the end of a file; a full disk leaves it where it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        print(f"{path}: {error.strerror}; {title} goes on without a log", file=sys.stderr)
    else:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            os.dup2(file, number)
        os.close(file)
    sys.stdout = io.TextIOWrapper(_Output(1, "wb", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(_Output(2, "wb", closefd=False), write_through=True)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"--- {title}, process {os.getpid()} on {socket.gethostname()}, {now}", flush=True)


def drop_launcher_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Remove the variables of other launchers from this process; returns their names."""
    found = [name for name in (os.environ if environ is None else environ) if name.startswith(LAUNCHER_PREFIXES)]
    for name in found:
        os.environ.pop(name, None)
    return found
