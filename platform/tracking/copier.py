"""Copies a run to a tracker (MLflow, TensorBoard, W&B), each from a thread of its own.

The training process never waits for it, and it never fails a run. The spool is metrics.jsonl itself: the thread reads
whole lines from its last position and writes to a file of the run folder (mlflow.json) how far the tracker has them. So
nothing waits in memory, a tracker that comes back gets what it missed, and `send` copies a run later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from headrace.platform.tracking.run_folder import METRICS_FILE, STEP, read_json, write_json
from headrace.storage.core.errors import HeadraceError
from headrace.storage.core.json_lines import read_lines

FLUSH_EVERY_S = 2.0
# How long the end of a run waits for a store that works, and for one that has failed before.
FINISH_S, FINISH_AFTER_FAILURE_S = 30.0, 8.0
FIRST_RETRY_S, LAST_RETRY_S = 4.0, 60.0
POINTS_PER_BATCH = 1000


class TrackedRun(Protocol):
    """A run that a tracker has opened. Every method may raise whatever the tracker raises."""

    run_id: str

    def describe(self) -> None:
        """Send what is known before the first step."""

    def points(self, line: Mapping[str, Any]) -> list[Any]:
        """A line of metrics.jsonl as the tracker's points, without values that are not finite."""

    def log(self, points: Sequence[Any]) -> None:
        """Send points."""

    def sample_system(self, num_samples: int) -> int:
        """Send a sample of the node's load where one is due; returns how many there are."""

    def close(self, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> None:
        """Copy files and end the run: FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """Where runs are copied to.

    Args:
        name: for people. tracking_uri: where it is. look: how a person sees the run there.
        state_file: of the run folder; says how far the tracker has the run.
    """

    @property
    def name(self) -> str: ...

    @property
    def tracking_uri(self) -> str: ...

    @property
    def look(self) -> str: ...

    @property
    def state_file(self) -> str: ...

    def open_run(self, run_id: str | None) -> TrackedRun:
        """Continue a run of the tracker, or begin one. Imports the tracker's package."""


class RunCopier:
    """One run's copy in one tracker.

    Args:
        run_dir: the run folder.
        say: called with a sentence once when the tracker is lost, and once when it answers again; from the thread.
    """

    def __init__(self, run_dir: Path, tracker: Tracker, say: Callable[[str], None]) -> None:
        self.tracker = tracker
        self._run_dir, self._say = run_dir, say
        self._state = CopyState.load(run_dir / tracker.state_file, tracker.tracking_uri)
        self._run: TrackedRun | None = None
        self._ending = threading.Event()
        self._closing: tuple[str, Sequence[Path], Mapping[str, str]] | None = None
        self._failure: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"headrace-{tracker.name}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once (a tracker takes seconds to import)."""
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """The tracker's name of the run, once it has one."""
        return self._state.run_id

    @property
    def failure(self) -> str | None:
        """Why the tracker does not have all of the run; None while it keeps up."""
        return self._failure

    def finish(self, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> str | None:
        """Send what is left and close the run; waits half a minute at most, less where the tracker was lost before.

        Args:
            status: FINISHED, FAILED or KILLED.
            artifacts: files to copy; missing ones are left out.

        Returns:
            None when the tracker has all of it, otherwise why not.
        """
        self._closing = (status, artifacts, tags)
        limit_s = FINISH_S if self._failure is None else FINISH_AFTER_FAILURE_S
        self._ending.set()
        self._thread.join(limit_s)
        if self._closed:
            return None
        return self._failure or f"it did not answer within {limit_s:.0f} s"

    def _work(self) -> None:
        retry_s, next_try = FIRST_RETRY_S, 0.0
        while True:
            ending = self._ending.wait(FLUSH_EVERY_S if self._run is not None else min(1.0, FLUSH_EVERY_S))
            if not ending and time.monotonic() < next_try:
                continue
            try:
                self._copy(ending)
            except Exception as error:  # whatever the tracker, its store or the network throws: the run goes on
                self._lost(error)
                next_try, retry_s = time.monotonic() + retry_s, min(LAST_RETRY_S, 2 * retry_s)
            else:
                if self._failure is not None:
                    self._failure = None
                    self._say(f"{self.tracker.name} answers again: it has all points now")
                retry_s, next_try = FIRST_RETRY_S, 0.0
            if ending:
                return

    def _copy(self, ending: bool) -> None:
        if self._run is None:
            self._run = self.tracker.open_run(self._state.run_id)
            self._state.run_id = self._run.run_id
            self._state.save()
            self._run.describe()
        copy_lines(self._run, self._run_dir / METRICS_FILE, self._state)
        self._state.num_samples = self._run.sample_system(self._state.num_samples)
        if ending and self._closing is not None:
            status, artifacts, tags = self._closing
            self._run.close(status, artifacts, tags)
            self._state.save()
            self._closed = True

    def _lost(self, error: Exception) -> None:
        ours = isinstance(error, HeadraceError)  # it names the remedy
        words = str(error) if ours else f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        first, self._failure = self._failure is None, words
        if first:
            self._say(
                f"{self.tracker.name} at {self.tracker.tracking_uri} refuses the run ({words}); the run continues and "
                f"its folder has everything: `headrace mlflow --send {self._run_dir}` copies it later"
            )


class CopyState:
    """How far a tracker has the run: the content of its file."""

    def __init__(self, path: Path, tracking_uri: str) -> None:
        self.path, self.tracking_uri = path, tracking_uri
        self.run_id: str | None = None
        self.offset = self.last_step = self.num_samples = 0

    @classmethod
    def load(cls, path: Path, tracking_uri: str) -> CopyState:
        """What the file says; a new state if it is missing or belongs to another place."""
        state = cls(path, tracking_uri)
        there = read_json(state.path)
        if there.get("tracking_uri") == tracking_uri and isinstance(there.get("run_id"), str):
            state.run_id = there["run_id"]
            state.offset, state.last_step = int(there.get("offset", 0)), int(there.get("last_step", 0))
            state.num_samples = int(there.get("num_samples", 0))
        return state

    def save(self) -> None:
        """Write the file. Where the disk is full, a later call does; MLflow takes the same points twice as once."""
        keys = ("tracking_uri", "run_id", "offset", "last_step", "num_samples")
        with suppress(OSError):
            write_json(self.path, {key: getattr(self, key) for key in keys})


def copy_lines(run: TrackedRun, path: Path, state: CopyState) -> None:
    """Send the lines that the tracker does not have, in batches, and move `state` on after each.

    A tracker keeps every value of a name and step, so a step that was run again after a restart is not sent again:
    there the first one stays, here (read_metrics) the last one counts.
    """
    points: list[Any] = []
    offset, last_step = state.offset, state.last_step
    if path.exists() and path.stat().st_size < offset:
        offset = 0
    for line, behind in read_lines(path, offset):
        step = line.get(STEP)
        new = run.points(line) if isinstance(step, int) and step > last_step else []
        if points and len(points) + len(new) > POINTS_PER_BATCH:
            run.log(points)
            state.offset, state.last_step = offset, last_step
            state.save()
            points = []
        points += new
        offset, last_step = behind, max(last_step, step) if isinstance(step, int) else last_step
    if points:
        run.log(points)
    if offset != state.offset:
        state.offset, state.last_step = offset, last_step
        state.save()


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Say what a tracker refuses: it, its store and the network throw many kinds of errors.

    Raises:
        HeadraceError: `what`, and their words.
    """
    try:
        yield
    except HeadraceError:
        raise
    except Exception as error:
        raise HeadraceError(f"{what}: {error}") from error


def send(run_dir: Path, tracker: Tracker, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> str:
    """Copy a run that is over to a tracker, or what it missed of it. Blocks. Returns the tracker's run id.

    Raises:
        Exception: what the tracker raises.
    """
    state = CopyState.load(run_dir / tracker.state_file, tracker.tracking_uri)
    run = tracker.open_run(state.run_id)
    state.run_id = run.run_id
    run.describe()
    copy_lines(run, run_dir / METRICS_FILE, state)
    run.close(status, artifacts, tags)
    state.save()
    return run.run_id
