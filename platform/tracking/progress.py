"""What the terminal shows during a run: a bar, or plain lines where a bar cannot be shown. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from headrace.platform.tracking.config import Progress
from headrace.workers.telemetry import names
from headrace.workers.telemetry.describe import describe

LINE_EVERY_S = 1.0
# A step that is done sooner needs no word about its parts.
PART_AFTER_S, PART_LINE_EVERY_S = 2.0, 30.0
SMOOTHING = 0.1  # weight of the newest step in the time that is left


class Terminal(Console):
    """A console whose reader may close: rich would end the process then, but a run continues without output."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True


class ProgressView:
    """Shows steps and sentences; this one only what must be said."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, step: int) -> None:
        """The run goes on after `step`."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def stage(self, text: str) -> None:
        """What is going on before the first step of a group is done."""

    def part(self, text: str) -> None:
        """How far the step at hand is."""

    def say(self, text: str) -> None:
        """A sentence for people."""
        self._print(text)

    def close(self) -> None:
        """Leave the terminal as it was."""

    def _print(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError):
            # The terminal is closed; the run folder has everything.
            self._console.quiet = True


def open_progress(
    choice: Progress, num_steps: int, console: Console | None = None, *, verb: str = "train", unit: str = "step"
) -> ProgressView:
    """The view of a run of `num_steps` steps; it writes to standard error, so that standard output stays the verb's.

    Args:
        verb / unit: before the bar, and before the number of a step.
    """
    console = console or Terminal(stderr=True)
    if choice is Progress.auto:
        choice = Progress.bar if console.is_terminal else Progress.lines
    if choice is Progress.bar:
        return _Bar(console, num_steps, verb)
    return _Lines(console, num_steps, unit) if choice is Progress.lines else ProgressView(console)


class _Lines(ProgressView):
    """One line a step, at most one a second; the first and the last step always."""

    def __init__(self, console: Console, num_steps: int, unit: str) -> None:
        super().__init__(console)
        self._num_steps, self._unit = num_steps, unit
        self._next_s = 0.0
        self._step, self._part_s = 0, time.monotonic()

    def start(self, step: int) -> None:
        self._step = step

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._step, self._part_s = step, now
        if now >= self._next_s or step >= self._num_steps or names.LOSS_EVAL in metrics:
            self._next_s = now + LINE_EVERY_S
            self._print(f"{self._unit} {step}/{self._num_steps}  {describe(metrics)}")

    def stage(self, text: str) -> None:
        self._print(f"starting: {text}")

    def part(self, text: str) -> None:
        now = time.monotonic()
        if now - self._part_s >= PART_LINE_EVERY_S:
            self._part_s = now
            self._print(f"{self._unit} {self._step + 1}/{self._num_steps}  {text}")


class _Bar(ProgressView):
    """A bar that redraws itself; sentences appear above it."""

    def __init__(self, console: Console, num_steps: int, verb: str) -> None:
        super().__init__(console)
        self._bar = RichProgress(
            TextColumn(verb),
            BarColumn(bar_width=None, table_column=Column(width=max(8, min(24, console.width // 8)))),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            # What is left of the line; where it is narrow, the figures at its end are cut and nothing before them.
            TextColumn("ETA {task.fields[eta]}", table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[text]}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self._task = self._bar.add_task(verb, total=num_steps, text="starting", eta="-:--:--")
        self._num_steps, self._step_s = num_steps, 0.0
        self._text, self._shown_s = "", time.monotonic()

    def start(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        # By the steps' own times: reports come in bursts, and a clock between them would be far off.
        step_s = metrics.get(names.STEP_S, self._step_s)
        self._step_s = self._step_s + SMOOTHING * (step_s - self._step_s) if self._step_s else step_s
        eta = timedelta(seconds=round(self._step_s * (self._num_steps - step)))
        self._text, self._shown_s = describe(metrics), time.monotonic()
        self._bar.update(self._task, completed=step, text=self._text, eta=str(eta))

    def stage(self, text: str) -> None:
        self._bar.update(self._task, text=f"starting: {text}")

    def part(self, text: str) -> None:
        if time.monotonic() - self._shown_s >= PART_AFTER_S:
            self._bar.update(self._task, text=f"{text}  {self._text}")

    def close(self) -> None:
        try:
            self._bar.stop()
        except (OSError, ValueError):
            self._console.quiet = True
