"""The pictures of several runs in one pair of axes, as SVG text. matplotlib without a display; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from headrace.platform.report.pictures import (
    INK,
    TIER_PEAKS,
    Steps,
    draw_line,
    draw_svg,
    memory_unit,
    new_figure,
    points,
)
from headrace.workers.telemetry import names

# Told apart by people who do not see all colours; after the last one the line style changes.
COLORS = ("#2f7fb8", "#d9822b", "#3a9d6e", "#7b5ea7", "#c0392b", "#52606d", "#b08900", "#1b998b")
STYLES = ("-", "--", ":", "-.")

NamedSteps = Sequence[tuple[str, Steps]]


def color(index: int) -> str:
    """Of the run with this index."""
    return COLORS[index % len(COLORS)]


def draw(runs: NamedSteps) -> list[dict[str, str]]:
    """Title, picture and caption of each; those that no run has figures for are left out.

    Args:
        runs: name and steps of each.
    """
    found = [
        ("Loss by step", _lines(runs, _loss, "step", "loss per target (nats)"), "Training loss of every step."),
        (
            "Loss by tokens",
            _lines(runs, _by(_loss, names.TOKENS_SEEN), "tokens seen", "loss per target (nats)"),
            "For runs whose steps have different tokens.",
        ),
        (
            "Loss by time",
            _lines(runs, _by_time, "seconds of training", "loss per target (nats)"),
            "Seconds of the steps; restarts and evaluation are left out.",
        ),
        (
            "Held-out loss",
            _lines(runs, lambda steps: points(steps, names.LOSS_EVAL), "step", "loss per target (nats)"),
            "",
        ),
        ("Step time", _lines(runs, lambda steps: points(steps, names.STEP_S), "step", "seconds", zero=True), ""),
        (
            "Model FLOPs utilisation",
            _lines(runs, lambda steps: points(steps, names.MFU_CAUSAL_PCT), "step", "% of the peak", zero=True),
            "MFU with causal attention.",
        ),
        ("Memory by tier", _peaks(runs), "Highest peak of the run, fullest rank."),
    ]
    return [{"title": title, "svg": svg, "caption": text} for title, svg, text in found if svg is not None]


def _loss(steps: Steps) -> list[tuple[float, float]]:
    return points(steps, names.LOSS_TRAIN)


def _by(
    values: Callable[[Steps], list[tuple[float, float]]], name: str
) -> Callable[[Steps], list[tuple[float, float]]]:
    """The same values over another metric than the step."""

    def find(steps: Steps) -> list[tuple[float, float]]:
        at = dict(points(steps, name))
        return [(at[step], value) for step, value in values(steps) if step in at]

    return find


def _by_time(steps: Steps) -> list[tuple[float, float]]:
    times = points(steps, names.STEP_S)
    at = dict(zip((step for step, _ in times), accumulate(value for _, value in times), strict=True))
    return [(at[step], value) for step, value in _loss(steps) if step in at]


def _lines(
    runs: NamedSteps,
    values: Callable[[Steps], list[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    *,
    zero: bool = False,
) -> str | None:
    drawn = [values(steps) for _, steps in runs]
    if not any(drawn):
        return None
    figure, axes = new_figure(xlabel, ylabel)
    for index, (line, (name, _)) in enumerate(zip(drawn, runs, strict=True)):
        draw_line(axes, line, color(index), name, STYLES[index // len(COLORS) % len(STYLES)])
    if zero:
        axes.set_ylim(bottom=0)
    return draw_svg(figure, num_columns=3)


def _peaks(runs: NamedSteps) -> str | None:
    """A group of bars for each tier that a run uses, a bar for each run."""
    peaks = {
        tier: [max((value for _, value in points(steps, name)), default=0.0) for _, steps in runs]
        for tier, name in TIER_PEAKS.items()
    }
    peaks = {tier: values for tier, values in peaks.items() if any(values)}
    if not peaks:
        return None
    unit, scale = memory_unit([value for values in peaks.values() for value in values])
    figure, axes = new_figure("", f"{unit}, fullest rank")
    width = 0.8 / len(runs)
    for index, (name, _) in enumerate(runs):
        at = [group + (index - (len(runs) - 1) / 2) * width for group in range(len(peaks))]
        heights = [values[index] * scale for values in peaks.values()]
        bars = axes.bar(at, heights, width * 0.92, color=color(index), label=name)
        if len(runs) * len(peaks) <= 12:
            axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8, color=INK)
    axes.set_xticks(range(len(peaks)), list(peaks))
    axes.grid(axis="x", visible=False)
    return draw_svg(figure, num_columns=3)
