"""Everything that is written down about a run, from its start to its end. No torch, no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.aggregate import aggregate, step_line
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.copier import RunCopier
from headrace.platform.tracking.progress import open_progress
from headrace.platform.tracking.provenance import provenance
from headrace.platform.tracking.settle import settle
from headrace.platform.tracking.summary import summarize
from headrace.platform.tracking.trackers import trackers_of
from headrace.platform.tracking.transfers import merge_transfers, moved_bytes
from headrace.storage.core.json_lines import JsonLines
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry.records import RankEvent, StepReport

ARTIFACTS = (
    folder.CONFIG_FILE,
    folder.PLAN_FILE,
    folder.METRICS_FILE,
    folder.EVENTS_FILE,
    folder.SUMMARY_FILE,
    folder.REPORT_FILE,
)
PART_EVERY_S = 5.0
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "lost": "KILLED"}
# The controller says so before the first report of every group.
GROUP_STARTED = "group_started"
# Events that need no line on the terminal: they are the normal course of a run.
QUIET_EVENTS = ("checkpoint_saved", "plan_checked")


class RunRecorder:
    """Writes the run folder (DESIGN section 9), feeds the trackers and the progress view. Threads may call it.

    A line of metrics.jsonl is written when the last rank of the group has reported the step, and has left the process
    then: it survives SIGKILL. Only start() raises an error if the disk, MLflow, the terminal or a picture fails.

    Args:
        run_dir: the run folder; made when it is not there. One that has been used goes on: lines are appended.
        num_ranks: of the group. num_steps: of the whole run.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: TrackingConfig,
        *,
        num_ranks: int,
        num_steps: int,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.config, self.num_ranks, self.num_steps = config, num_ranks, num_steps
        self._lock = threading.RLock()
        self._by_rank: dict[int, dict[int, Mapping[str, float]]] = {}
        self._last_step: dict[int, int] = {}
        self._first_of_start, self._said_full = True, False
        self._started_unix_s = time.time()
        self._step, self._part_unix_s = 0, 0.0
        self._start_facts: dict[str, Any] = {}
        self._plan: dict[str, Any] = {}
        self._metrics: JsonLines | None = None
        self._events: JsonLines | None = None
        self._copiers: list[RunCopier] = []
        self._progress = open_progress(config.progress, num_steps)
        self._closing_words: str | None = None

    def start(self, config_text: str, plan: MemoryPlan | Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Open the folder, whose last run's records are finished first, and the trackers, in the background.

        Args:
            config_text: the resolved configuration, YAML. One that differs from the folder's is kept beside it.
            facts: what is known before the first step (hardware, data, mesh); JSON-able.

        Raises:
            OSError: the folder cannot be written. InputError: as settle.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        settle(self.run_dir)
        self._metrics = JsonLines(self.run_dir / folder.METRICS_FILE)
        self._events = JsonLines(self.run_dir / folder.EVENTS_FILE)
        self._write_config(config_text)
        self._plan = plan.to_dict() if isinstance(plan, MemoryPlan) else dict(plan)
        folder.write_json(self.run_dir / folder.PLAN_FILE, self._plan)
        self._start_facts = dict(facts)
        self._guard("merge the transfer logs of the last start", lambda: merge_transfers(self.run_dir))
        self._write_summary("running", {})
        known = {"facts": facts, "provenance": provenance().to_json()}
        for tracker in trackers_of(self.run_dir, self.config, config_text, known):
            copier = RunCopier(self.run_dir, tracker, partial(self._say_of_tracker, tracker.name))
            self._copiers.append(copier)
            copier.start()
        steps = folder.read_metrics(self.run_dir / folder.METRICS_FILE)
        self._step = steps[-1][folder.STEP] if steps else 0
        self._progress.start(self._step)

    def on_report(self, report: StepReport) -> None:
        """One rank finished a step. When all ranks have, the step is written."""
        with self._lock:
            for event in report.events:
                self.on_event(event)
            if report.step <= self._last_step.get(report.rank, 0):
                self._begin_again()
            self._last_step[report.rank] = report.step
            ranks = self._by_rank.setdefault(report.step, {})
            ranks[report.rank] = report.metrics
            if len(ranks) == self.num_ranks:
                for step in sorted(s for s in self._by_rank if s <= report.step):
                    self._write_step(step, self._by_rank.pop(step))

    def on_event(self, event: RankEvent) -> None:
        """Record an event, and show it to the user."""
        with self._lock:
            if event.kind == GROUP_STARTED:
                self._begin_again()
            if self._events is not None:
                record = {folder.UNIX_S: time.time(), "kind": event.kind, "text": event.text, "facts": event.facts}
                self._check_disk(self._events.append(record))
            if event.kind not in QUIET_EVENTS:
                self._progress.say(event.text)

    def on_stage(self, text: str) -> None:
        """The stage of the start; only shown in the terminal."""
        self._progress.stage(text)

    def on_part(self, text: str) -> None:
        """How far the step at hand is: shown in the terminal, and in the folder for whoever looks at the run."""
        self._progress.part(text)
        now_s = time.time()
        if now_s - self._part_unix_s >= PART_EVERY_S:
            self._part_unix_s = now_s
            part = {folder.STEP: self._step + 1, folder.PART: text, folder.UNIX_S: now_s}
            with suppress(OSError):  # a full disk is told where metrics are written
                folder.write_json(self.run_dir / folder.PART_FILE, part)

    def on_plan(self, record: Mapping[str, Any]) -> None:
        """The run follows another plan, or knows more about its own: the new content of plan.json."""
        with self._lock:
            self._plan = dict(record)
            self._guard("write the plan", lambda: folder.write_json(self.run_dir / folder.PLAN_FILE, self._plan))

    def finish(self, outcome: str, facts: Mapping[str, Any]) -> str:
        """Close the records: merged transfer log, summary, report, trackers. A second call changes nothing.

        Args:
            outcome: finished, stopped or failed.
            facts: what is known at the end; `dashboard_url` is shown to the user.

        Returns:
            The text for the user, several lines.
        """
        with self._lock:
            if self._closing_words is not None:
                return self._closing_words
            word = str(outcome)
            for step in sorted(self._by_rank):
                self._write_step(step, self._by_rank.pop(step))
            self._progress.close()
            with suppress(OSError):
                (self.run_dir / folder.PART_FILE).unlink(missing_ok=True)
            self._guard("merge the transfer logs", lambda: merge_transfers(self.run_dir))
            self._guard("write the summary", lambda: self._write_summary(word, facts))
            self._guard("write the report", lambda: _write_report(self.run_dir))
            for lines in (self._metrics, self._events):
                if lines is not None:
                    self._check_disk(lines.flush())
        files, status = [self.run_dir / name for name in ARTIFACTS], MLFLOW_STATUS.get(word, "FAILED")
        missing = [(copier, copier.finish(status, files, {"headrace.outcome": word})) for copier in self._copiers]
        self._closing_words = self._describe_end(word, facts, missing)
        return self._closing_words

    def _begin_again(self) -> None:
        """A new group starts from a checkpoint: what the one before had not finished writing, it writes again."""
        self._by_rank.clear()
        self._last_step.clear()
        self._first_of_start = True

    def _write_step(self, step: int, by_rank: Mapping[int, Mapping[str, float]]) -> None:
        metrics = aggregate(by_rank)
        line = step_line(step, metrics, unix_s=time.time(), num_ranks=len(by_rank))
        if self._first_of_start:
            line[folder.FIRST_OF_START] = True
            self._first_of_start = False
        if self._metrics is not None:
            self._check_disk(self._metrics.append(line))
        self._step = step
        self._progress.show(step, metrics)

    def _write_config(self, text: str) -> None:
        path = self.run_dir / folder.CONFIG_FILE
        if path.exists() and path.read_text(encoding="utf-8") != text:
            number = 1 + sum(1 for _ in self.run_dir.glob("config-*.yaml"))
            kept = path.with_name(f"config-{number}.yaml")
            path.replace(kept)
            self.on_event(
                RankEvent("config_drift", f"the run continues with another configuration; the earlier one is in {kept}")
            )
        folder.write_text(path, text)

    def _write_summary(self, outcome: str, facts: Mapping[str, Any]) -> None:
        steps = folder.read_metrics(self.run_dir / folder.METRICS_FILE)
        summary = {
            "outcome": outcome,
            "started_unix_s": self._started_unix_s,
            "wall_s": time.time() - self._started_unix_s,
            "num_steps": self.num_steps,
            **summarize(steps, self._plan.get("predicted", {}), self.num_ranks),
            "moved_bytes": moved_bytes(self.run_dir / folder.TRANSFERS_FILE) if outcome != "running" else {},
            "provenance": provenance().to_json(),
            "facts": {**self._start_facts, **facts},
        }
        folder.write_json(self.run_dir / folder.SUMMARY_FILE, summary)

    def _say_of_tracker(self, name: str, text: str) -> None:
        # From the copier's thread, also while finish() waits for it: no lock of ours.
        self._progress.say(text)
        if self._events is not None:
            self._events.append({folder.UNIX_S: time.time(), "kind": name.lower(), "text": text, "facts": {}})

    def _check_disk(self, error: OSError | None) -> None:
        if error is not None and not self._said_full:
            self._said_full = True
            self._progress.say(f"{self.run_dir}: {error.strerror or error}; metrics wait in memory until there is room")

    def _guard(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a record that cannot be written must not turn a finished run into a failed one
            self.on_event(RankEvent("record_failed", f"could not {what}: {type(error).__name__}: {error}"))

    def _describe_end(
        self, outcome: str, facts: Mapping[str, Any], missing: Sequence[tuple[RunCopier, str | None]]
    ) -> str:
        summary = folder.read_json(self.run_dir / folder.SUMMARY_FILE)
        loss = summary.get("loss", {})
        losses = "" if loss.get("last") is None else f", loss {loss['first']:.4f} to {loss['last']:.4f}"
        wall = f"{time.time() - self._started_unix_s:.0f} s"
        lines = [f"run {outcome}: {summary.get('last_step', 0)} of {self.num_steps} steps{losses}, {wall}"]
        lines.append(f"  folder      {self.run_dir}")
        if (self.run_dir / folder.REPORT_FILE).exists():
            lines.append(f"  report      {self.run_dir / folder.REPORT_FILE}")
        for copier, why in missing:
            look = f"is not complete ({why}): headrace mlflow --send {self.run_dir}"
            lines.append(f"  {copier.tracker.name:<11} {copier.tracker.look if why is None else look}")
        if facts.get("dashboard_url") and not facts.get("ray_started_by_run"):  # else it ended with the run
            lines.append(f"  dashboard   {facts['dashboard_url']}")
        return "\n".join(lines)


def _write_report(run_dir: Path) -> None:
    from headrace.platform.report.page import write_report

    write_report(run_dir)
