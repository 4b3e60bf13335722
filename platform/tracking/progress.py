"""What the terminal shows while a run goes on: a bar, or plain lines where nobody could see a bar. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from headrace.platform.tracking.config import Progress
from headrace.workers.telemetry import names

LINE_EVERY_S = 1.0


class Terminal(Console):
    """A console whose reader may leave: rich would end the process then, a run goes on in silence."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True


class ProgressView(Protocol):
    """Shows steps and sentences."""

    def start(self, step: int) -> None:
        """The run goes on after `step`."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""

    def say(self, text: str) -> None:
        """A sentence for people."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(choice: Progress, num_steps: int, console: Console | None = None) -> ProgressView:
    """The view of a run of `num_steps` steps; it writes to standard error, so that standard output stays the verb's."""
    console = console or Terminal(stderr=True)
    if choice is Progress.auto:
        choice = Progress.bar if console.is_terminal else Progress.lines
    if choice is Progress.bar:
        return _Bar(console, num_steps)
    return _Lines(console, num_steps) if choice is Progress.lines else _Off(console)


def describe(metrics: Mapping[str, float]) -> str:
    """The figures people watch: loss, tokens/s per GPU, MFU, what the tiers hold."""
    parts = []
    for name, form in {
        names.LOSS_TRAIN: "loss {:.4f}",
        names.LOSS_EVAL: "eval {:.4f}",
        names.STEP_S: "{:.3g} s",
        names.TOKENS_PER_S_PER_GPU: "{:,.0f} tok/s",
        names.MFU_CAUSAL_PCT: "MFU {:.1f} %",
    }.items():
        if name in metrics:
            parts.append(form.format(metrics[name]))
    tiers = {"device": names.GPU_PEAK_GIB, "host": names.HOST_PEAK_GIB, "ssd": names.SSD_PEAK_GIB}
    held = [f"{tier} {_gib(metrics[name])}" for tier, name in tiers.items() if name in metrics]
    return "  ".join([*parts, " ".join(held)] if held else parts)


def _gib(value: float) -> str:
    return f"{value:.1f}G" if value >= 10 else f"{value:.2f}G" if value >= 1 else f"{value * 1024:.3g}M"


class _Off:
    """Only what must be said."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, step: int) -> None:
        pass

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, ValueError):
            # Nobody reads the terminal any more; the run folder has it all.
            self._console.quiet = True


class _Lines(_Off):
    """One line a step, at most one a second; the first and the last step always."""

    def __init__(self, console: Console, num_steps: int) -> None:
        super().__init__(console)
        self._num_steps = num_steps
        self._next_s = 0.0

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now >= self._next_s or step >= self._num_steps or names.LOSS_EVAL in metrics:
            self._next_s = now + LINE_EVERY_S
            self._print(f"step {step}/{self._num_steps}  {describe(metrics)}")


class _Bar(_Off):
    """A bar that redraws itself; sentences appear above it."""

    def __init__(self, console: Console, num_steps: int) -> None:
        super().__init__(console)
        self._bar = RichProgress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("train", total=num_steps, text="starting")

    def start(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step, text=describe(metrics))

    def close(self) -> None:
        try:
            self._bar.stop()
        except (OSError, ValueError):
            self._console.quiet = True
