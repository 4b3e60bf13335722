"""A grid of runs: which runs it has, and how they run one after the other or some at once. No Ray, no mlflow.

Every run is a `headrace train` in a process of its own: what one does cannot touch another, and a run of a sweep is a
run like any other. sweep.json in the sweep's folder names them, so the same command later does what is left.
"""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from headrace.platform.config.schema import key_types
from headrace.platform.config.words import SEVERAL
from headrace.platform.control.signals import StopSignals
from headrace.platform.tracking.run_folder import CONFIG_FILE, SUMMARY_FILE, read_json, write_json
from headrace.platform.tracking.run_owner import owner_of_run
from headrace.storage.core.errors import ErrorId, InputError

SWEEP_FILE = "sweep.json"
POLL_S = 0.2
MAX_NAME = 100
# Words that `make` passes to every program; those of a sweep are in its runs already.
PASSED_WORDS = ("HEADRACE_CONF", "HEADRACE_OVERRIDES")
Say = Callable[[str], None]


class RunEnd(StrEnum):
    """How a run of a sweep stands."""

    waiting = "waiting"
    finished = "finished"
    failed = "failed"
    refused = "refused"  # its input was wrong, or its plan does not fit: nothing was started
    stopped = "stopped"


END_OF_CODE = {0: RunEnd.finished, 2: RunEnd.refused, 3: RunEnd.stopped}


@dataclass(frozen=True)
class SweepRun:
    """One run: its name, and the words of `headrace train` for it."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """Keys with several values, and a run for each combination; the last key varies fastest."""

    axes: Mapping[str, Sequence[str]]
    runs: tuple[SweepRun, ...]


@dataclass(frozen=True)
class Sweep:
    """A grid of runs and the folder that they are in, each in a folder of its name."""

    folder: Path
    grid: Grid

    @property
    def runs(self) -> tuple[SweepRun, ...]:
        """The runs of the grid."""
        return self.grid.runs

    def run_dir(self, run: SweepRun) -> Path:
        """The run folder of a run."""
        return self.folder / run.name

    def log(self, run: SweepRun) -> Path:
        """What the run prints."""
        return self.folder / f"{run.name}.log"

    def end(self, run: SweepRun) -> RunEnd:
        """How a run stands by the records of its folder."""
        outcome = read_json(self.run_dir(run) / SUMMARY_FILE).get("outcome")
        return RunEnd(outcome) if outcome in ("finished", "failed", "stopped") else RunEnd.waiting


def read_grid(words: Sequence[str]) -> Grid:
    """The runs of `KEY=A,B,C` words: every combination.

    A comma separates values, except in keys that hold a list. Words behind `--` are taken as they are.

    Raises:
        InputError: no word has several values, a value is empty or given twice.
    """
    own = list(words)
    fixed = own[own.index("--") + 1 :] if "--" in own else []
    own = own[: own.index("--")] if "--" in own else own
    lists = {SEVERAL, *(key for key, kind in key_types().items() if kind.kind in (list, dict))}
    axes: dict[str, list[str]] = {}
    for word in own:
        key, _, text = word.partition("=")
        values = text.split(",") if key not in lists else [text]
        if len(values) == 1:
            fixed.append(word)
            continue
        if key in axes:
            raise InputError(f"{word}: {key} has several values already; give them in one word")
        if "" in values or len(set(values)) < len(values):
            raise InputError(f"{word}: a value is empty or given twice")
        axes[key] = values
    if not axes:
        raise InputError("sweep: no word has several values, such as optim.lr=1e-3,1e-4; `headrace train` does one run")
    runs = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        runs.append(SweepRun(_name(chosen), (*fixed, *(f"{key}={value}" for key, value in chosen.items()))))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        runs = [SweepRun(f"{index:03d}_{run.name}", run.words) for index, run in enumerate(runs)]
    return Grid(axes, tuple(runs))


def _name(chosen: Mapping[str, str]) -> str:
    last = [key.rpartition(".")[2] for key in chosen]
    parts = [
        f"{short if last.count(short) == 1 else key}-{value}"
        for short, (key, value) in zip(last, chosen.items(), strict=True)
    ]
    return re.sub(r"[^\w.+-]+", "_", "_".join(parts))[:MAX_NAME].strip(".")


def open_sweep(folder: Path, grid: Grid) -> Sweep:
    """The sweep of a folder, new or to go on with.

    Raises:
        InputError: the folder holds another sweep, or is used otherwise.
    """
    path = folder / SWEEP_FILE
    record = {"runs": [{"name": run.name, "words": list(run.words)} for run in grid.runs]}
    try:
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"dir={folder}: is not empty and holds no sweep; name another folder")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
    except OSError as error:
        raise InputError(
            f"dir={folder}: {error.strerror or error}; name a folder that can be written",
            id=ErrorId.run_folder_unusable,
        ) from error
    if read_json(path) != record:
        raise InputError(f"dir={folder}: holds a sweep of other words; repeat them ({path}), or name another folder")
    return Sweep(folder, grid)


class SweepRunner:
    """Runs what is left of a sweep.

    Args:
        jobs: runs at once.
        words: further words for every run, that its name and its record do not have.
        environ: for the runs.
        say: gets a line when a run begins and ends.
        program: of a run, in front of its words.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        jobs: int,
        words: Sequence[str],
        environ: Mapping[str, str],
        say: Say,
        program: Sequence[str] = (sys.executable, "-m", "headrace.platform.cli.main"),
    ) -> None:
        self._sweep, self._jobs, self._words, self._say = sweep, jobs, tuple(words), say
        self._environ = {key: value for key, value in environ.items() if key not in PASSED_WORDS}
        self._program = tuple(program)
        self._ends = {run.name: sweep.end(run) for run in sweep.runs}
        self._now: dict[str, subprocess.Popen[bytes]] = {}

    def run(self) -> dict[str, RunEnd]:
        """Do what is left; how each run ended, by name. A run that finished before is not run again.

        After a first signal the runs at hand save a checkpoint and stop, and no further one begins.

        Raises:
            InputError: a run of this sweep is under way in another process.
            KeyboardInterrupt: after a second signal; the runs have ended.
        """
        left = [run for run in self._sweep.runs if self._ends[run.name] is not RunEnd.finished]
        for run in left:
            if (owner := owner_of_run(self._sweep.run_dir(run))) is not None:
                raise InputError(f"{self._sweep.run_dir(run)}: {owner} runs it; wait for its end, or end it")
        with StopSignals() as stop:
            told = False
            try:
                while self._now or (left and not stop.requested()):
                    while left and len(self._now) < self._jobs and not stop.requested():
                        self._begin(left.pop(0))
                    if stop.requested() and not told:
                        told = True
                        self._signal()
                    time.sleep(POLL_S)
                    self._collect()
            except BaseException:
                self._signal()
                for process in self._now.values():
                    process.wait()
                raise
        return self._ends

    def _begin(self, run: SweepRun) -> None:
        run_dir = self._sweep.run_dir(run)
        self._say(f"{self._place(run.name)} {run.name}: begins; it prints to {self._sweep.log(run)}")
        if (run_dir / CONFIG_FILE).exists():
            words = ["--resume", str(run_dir)]
        else:
            words = [*run.words, *self._words, f"run.dir={run_dir}", f"run.name={run.name}"]
        with self._sweep.log(run).open("ab") as log:
            self._now[run.name] = subprocess.Popen(
                [*self._program, "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,  # a Ctrl-C reaches it once, by us
            )

    def _collect(self) -> None:
        for name, process in list(self._now.items()):
            if (code := process.poll()) is None:
                continue
            del self._now[name]
            self._ends[name] = END_OF_CODE.get(code, RunEnd.failed)
            run = next(run for run in self._sweep.runs if run.name == name)
            why = "" if code in (0, 3) else f": {_last_line(self._sweep.log(run))}"
            self._say(f"{self._place(name)} {name}: {self._ends[name].value}{why}")

    def _place(self, name: str) -> str:
        at = next(index for index, run in enumerate(self._sweep.runs) if run.name == name)
        return f"[{at + 1}/{len(self._sweep.runs)}]"

    def _signal(self) -> None:
        for process in self._now.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"nothing in {log}"
