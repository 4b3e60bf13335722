from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from headrace.platform.tracking import progress
from headrace.platform.tracking.config import Progress
from headrace.platform.tracking.progress import Terminal, describe, open_progress
from headrace.workers.telemetry import names

METRICS = {
    names.LOSS_TRAIN: 5.12345,
    names.STEP_S: 2.5,
    names.TOKENS_PER_S_PER_GPU: 1638.4,
    names.MFU_CAUSAL_PCT: 31.24,
    names.GPU_PEAK_GIB: 12.5,
    names.HOST_PEAK_GIB: 1.5,
    names.SSD_PEAK_GIB: 0.25,
}


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def text(view_console: Console) -> str:
    file = view_console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_the_figures_people_watch() -> None:
    assert describe(METRICS) == "loss 5.1235  2.5 s  1,638 tok/s  MFU 31.2 %  device 12.5G host 1.50G ssd 256M"
    assert describe({}) == ""


def test_lines_where_there_is_no_terminal() -> None:
    out = console(terminal=False)
    view = open_progress(Progress.auto, 2, out)
    view.start(0)
    view.show(1, METRICS)
    view.say("[red]not markup[/red] 5.0")
    view.show(2, METRICS)
    view.close()
    assert text(out).splitlines() == [f"step 1/2  {describe(METRICS)}", "[red]not markup[/red] 5.0",
                                      f"step 2/2  {describe(METRICS)}"]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_keeps_bar_steps_and_time_left(width: int) -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=width)
    view = open_progress(Progress.bar, 10_000, out)
    view.start(0)
    for stage in ("Ray", "ranks", "opening the data", "first step"):
        view.stage(stage)
        view._bar.refresh()
        assert f"starting: {stage}"[: width - 58] in text(out)
    for step in range(1, 4):
        view.show(step, METRICS)
        view._bar.refresh()
    view.close()
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]+", text(out))]
    last = [line for line in lines if line.strip()][-1]
    assert len(last.rstrip()) <= width
    assert "3/10000" in last
    assert "ETA 6:56:32" in last  # 9997 steps of 2.5 s
    assert "\u2501" in last  # the bar
    assert "loss 5.1235" in last


def test_ten_thousand_fast_steps_are_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * 0.001)
    out = console(terminal=False)
    view = open_progress(Progress.lines, 10_000, out)
    for step in range(1, 10_001):
        view.show(step, METRICS)
    lines = text(out).splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("step 1/")
    assert lines[-1].startswith("step 10000/")


def test_a_bar_on_a_terminal() -> None:
    out = console(terminal=True)
    view = open_progress(Progress.auto, 4, out)
    view.start(1)
    view.show(3, METRICS)
    view.say("a sentence")
    view.close()
    assert "3/4" in text(out)
    assert "MFU 31.2 %" in text(out)
    assert "a sentence" in text(out)


def test_off_shows_only_sentences() -> None:
    out = console(terminal=True)
    view = open_progress(Progress.off, 4, out)
    view.start(0)
    view.show(1, METRICS)
    view.say("a sentence")
    view.close()
    assert text(out) == "a sentence\n"


@pytest.mark.parametrize("choice", [Progress.lines, Progress.bar])
def test_a_closed_terminal_does_not_end_the_run(choice: Progress) -> None:
    class Gone(io.StringIO):
        gone = False

        def write(self, words: str) -> int:
            if self.gone:
                raise BrokenPipeError
            return super().write(words)

    file = Gone()
    view = open_progress(choice, 3, Terminal(file=file, force_terminal=True, width=100))
    view.start(0)
    view.show(1, METRICS)
    file.gone = True
    view.show(3, METRICS)
    view.say("nobody hears this")
    view.close()


def test_a_long_step_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = console(terminal=False)
    view = open_progress(Progress.lines, 9, out)
    view.start(4)
    view.show(5, METRICS)
    for second in range(1, 65):
        now[0] = float(second)
        view.part(f"stage 2/2, chunk {second}/64")
    assert text(out).splitlines()[1:] == ["step 6/9  stage 2/2, chunk 30/64", "step 6/9  stage 2/2, chunk 60/64"]
    out = console(terminal=True)
    view = open_progress(Progress.bar, 9, out)
    view.start(4)
    view.show(5, METRICS)
    for second, shown in ((65.0, False), (67.0, True)):
        now[0] = second
        view.part("stage 2/2, chunk 1/64")
        view._bar.refresh()
        assert ("stage 2/2, chunk 1/64  loss 5.1235" in text(out)) is shown
    view.close()
