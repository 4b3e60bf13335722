"""The pictures of a run as SVG text. matplotlib without a display; no torch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.platform.report.occupancy import Moves, Occupancy, occupancy
from headrace.platform.tracking.run_folder import FIRST_OF_START, STEP
from headrace.workers.telemetry import names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Steps = Sequence[Mapping[str, Any]]
INK, GRID = "#1f2933", "#e4e7eb"
TIER_COLOR = {"device": "#7b5ea7", "host": "#2f7fb8", "ssd": "#d9822b"}
TIER_TENSORS = {"host": names.HOST_TENSOR_GIB, "ssd": names.SSD_TENSOR_GIB}
TIER_PEAKS = {"device": names.GPU_PEAK_GIB, "host": names.HOST_PEAK_GIB, "ssd": names.SSD_PEAK_GIB}
MFU_LINES = {
    names.MFU_CAUSAL_PCT: ("MFU, causal attention", "#2f7fb8"),
    names.MFU_FULL_ATTENTION_PCT: ("MFU, full attention", "#7b5ea7"),
    names.HFU_PCT: ("HFU, with recomputation", "#d9822b"),
}
TIER_STYLE = {"device": "-", "host": "-", "ssd": "--"}
MAX_POINTS, MAX_CORNERS, MAX_SLICES = 2000, 600, 400


def loss_picture(steps: Steps) -> str | None:
    """Training loss of every step, evaluation loss where there is one; None where there is neither."""
    figure, axes = new_figure("step", "loss per target (nats)")
    draw_line(axes, points(steps, names.LOSS_TRAIN), "#2f7fb8", "train")
    if evals := points(steps, names.LOSS_EVAL):
        axes.plot(*zip(*evals, strict=True), color="#d9822b", marker="o", markersize=4, linewidth=1.2, label="eval")
    return _by_step(figure, axes, steps)


def sparse_picture(steps: Steps) -> str | None:
    """Loss of the same held-out rows with dense and with page-sparse attention; None where it was not compared."""
    figure, axes = new_figure("step", "loss per target (nats)")
    draw_line(axes, points(steps, names.SPARSE_LOSS_DENSE), INK, "dense")
    draw_line(axes, points(steps, names.SPARSE_LOSS_SPARSE), "#d9822b", "page-sparse", "--")
    return _by_step(figure, axes, steps)


def optimizer_picture(steps: Steps) -> str | None:
    """Learning rate, and the norm of the gradient before clipping, over steps; None where neither was recorded."""
    figure, axes = new_figure("step", "gradient norm")
    draw_line(axes, points(steps, names.GRAD_NORM), "#2f7fb8", "gradient norm")
    if rates := points(steps, names.LEARNING_RATE):
        right = axes.twinx()
        right.set_ylabel("learning rate", color=INK)
        right.spines[["top", "left"]].set_visible(False)
        right.tick_params(colors=INK, labelsize=9)
        draw_line(right, rates, "#d9822b", "learning rate")
        right.set_ylim(bottom=0)
    return _by_step(figure, axes, steps, bottom=0)


def mfu_picture(steps: Steps) -> str | None:
    """The three utilisations over steps."""
    figure, axes = new_figure("step", "% of the device's peak")
    for name, (label, color) in MFU_LINES.items():
        draw_line(axes, points(steps, name), color, label)
    return _by_step(figure, axes, steps, bottom=0)


def speed_picture(steps: Steps) -> str | None:
    """Seconds of every step, and what of it was spent waiting for transfers and for data."""
    figure, axes = new_figure("step", "seconds")
    draw_line(axes, points(steps, names.STEP_S), INK, "step")
    exposed = [
        (s[STEP], s[names.STEP_S] * s[names.EXPOSED_PCT] / 100)
        for s in steps
        if _is_number(s.get(names.STEP_S)) and _is_number(s.get(names.EXPOSED_PCT))
    ]
    draw_line(axes, exposed, "#c0392b", "exposed transfer")
    draw_line(axes, points(steps, names.DATA_WAIT_S), "#3a9d6e", "waiting for data")
    return _by_step(figure, axes, steps, bottom=0)


def peaks_picture(steps: Steps) -> str | None:
    """Peak of every tier, step by step, of the fullest rank."""
    unit, scale = memory_unit([value for name in TIER_PEAKS.values() for _, value in points(steps, name)])
    figure, axes = new_figure("step", f"{unit}, fullest rank")
    for tier, name in TIER_PEAKS.items():
        line = [(step, value * scale) for step, value in points(steps, name)]
        draw_line(axes, line, TIER_COLOR[tier], tier, TIER_STYLE[tier])
    return _by_step(figure, axes, steps, bottom=0)


def tensors_picture(steps: Steps) -> str | None:
    """Peak of every tensor in its tier, of the fullest rank and step; None where no tier was used."""
    peaks: dict[tuple[str, str], float] = {}
    for step in steps:
        for metric, value in step.items():
            family, tensor = names.split_tensor(metric)
            if tensor is not None and _is_number(value):
                peaks[family, tensor] = max(value, peaks.get((family, tensor), 0.0))
    if not peaks:
        return None
    unit, scale = memory_unit(list(peaks.values()))
    figure, axes = new_figure(f"{unit}, fullest rank", "")
    drawn: list[str] = []
    for tier, family in TIER_TENSORS.items():
        rows = sorted((tensor, scale * peak) for (own, tensor), peak in peaks.items() if own == family)
        places = range(len(drawn), len(drawn) + len(rows))
        axes.barh(list(places), [peak for _, peak in rows], color=TIER_COLOR[tier], label=tier)
        drawn += [tensor.replace("-", " ") for tensor, _ in rows]
    axes.set_yticks(range(len(drawn)), drawn)
    axes.invert_yaxis()
    return draw_svg(figure)


def tiers_picture(moves: Moves, *, last_steps: int | None) -> str | None:
    """Bytes in host memory and on SSD over time, all ranks, from the transfer log.

    Args:
        last_steps: only the run's last steps; None draws all of it. What has too many corners to be seen is drawn by
            the fullest moment of each slice of time, about one slice a step.
    """
    found = occupancy(moves, last_steps=last_steps)
    if not found:
        return None
    unit, scale = memory_unit([max(curve.gib) for curve in found.values()])
    num_slices = min(MAX_SLICES, len({row["step"] for row in moves}) if last_steps is None else MAX_SLICES)
    figure, axes = new_figure("seconds", f"{unit}, all ranks")
    for tier, curve in found.items():
        time_s, held = _envelope(curve, num_slices)
        values = [value * scale for value in held]
        color, style = TIER_COLOR[tier], TIER_STYLE[tier]
        axes.step(time_s, values, where="post", color=color, linestyle=style, linewidth=1.3, label=tier)
        axes.fill_between(time_s, values, step="post", color=color, alpha=0.12, linewidth=0)
    axes.set_ylim(bottom=0)
    return draw_svg(figure)


def new_figure(xlabel: str, ylabel: str, *, width: float = 6.6, height: float = 3.0) -> tuple[Figure, Axes]:
    """An empty picture with our axes; inches."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    style_axes(axes, xlabel, ylabel)
    if xlabel == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def style_axes(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Our grid, lines and colours."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.tick_params(colors=INK, labelsize=9)


def draw_by_position(buckets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG of perplexity by position in the document; the axis of positions is logarithmic.

    Args:
        buckets: begin, end and perplexity of each, as `headrace eval --json` has them.
    """
    figure, axes = new_figure("position of the token in its document", "perplexity")
    drawn = [bucket for bucket in buckets if bucket["perplexity"] is not None]
    for bucket in drawn:
        ends = (max(bucket["begin"], bucket["end"] / 2), bucket["end"])
        axes.plot(ends, [bucket["perplexity"]] * 2, color="#2f7fb8", linewidth=2.5, solid_capstyle="butt")
    if drawn:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    figure.savefig(path, format="png", dpi=150)


def draw_svg(figure: Figure, *, num_columns: int = 4) -> str:
    """The figure as an <svg> element."""
    from matplotlib import rc_context

    handles = [handle for each in figure.axes for handle in each.get_legend_handles_labels()[0]]
    if handles:
        figure.legend(loc="outside upper right", ncols=num_columns, frameon=False, fontsize=9, labelcolor=INK)
    buffer = io.StringIO()
    # Text stays text: small, sharp, and it can be searched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "headrace", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw_line(axes: Axes, line: Sequence[tuple[float, float]], color: str, label: str, style: str = "-") -> None:
    """A line through at most some MAX_POINTS of the points; nothing where there is none."""
    if not line:
        return
    stride = -(-len(line) // MAX_POINTS)
    kept = list(line[::stride])
    if kept[-1] != line[-1]:
        kept.append(line[-1])
    marker = "o" if len(kept) == 1 else None
    axes.plot(*zip(*kept, strict=True), color=color, linewidth=1.4, linestyle=style, label=label, marker=marker)


def _by_step(figure: Figure, axes: Axes, steps: Steps, *, bottom: float | None = None) -> str | None:
    if not any(each.lines for each in figure.axes):
        return None
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    _mark_restarts(axes, steps)
    return draw_svg(figure)


def _mark_restarts(axes: Axes, steps: Steps) -> None:
    starts = [s[STEP] for s in steps[1:] if s.get(FIRST_OF_START)]
    for number, step in enumerate(starts):
        axes.axvline(
            step - 0.5, color="#c0392b", linestyle=":", linewidth=1, label="restart" if number == 0 else "_nolegend_"
        )


def points(steps: Steps, name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, without steps that do not have it or where it was not finite."""
    return [(s[STEP], float(s[name])) for s in steps if _is_number(s.get(name))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def memory_unit(gib: Sequence[float]) -> tuple[str, float]:
    """The unit to draw such peaks in, and what GiB are multiplied with."""
    return ("GiB", 1.0) if max(gib, default=0.0) >= 1.0 else ("MiB", 1024.0)


def _envelope(curve: Occupancy, num_slices: int) -> tuple[list[float], list[float]]:
    """The curve itself, or, where it has too many corners to be seen, the fullest moment of each slice of time."""
    if len(curve.time_s) <= MAX_CORNERS:
        return list(curve.time_s), list(curve.gib)
    width = (curve.time_s[-1] - curve.time_s[0]) / num_slices or 1.0
    fullest: dict[int, float] = {}
    at, held = -1, 0.0
    for time_s, gib in zip(curve.time_s, curve.gib, strict=True):
        now = min(num_slices - 1, int((time_s - curve.time_s[0]) / width))
        for index in range(at + 1, now + 1):
            # What was there when the slice began counts in it.
            fullest[index] = held
        fullest[now] = max(fullest[now], gib)
        at, held = now, gib
    return [curve.time_s[0] + index * width for index in fullest], list(fullest.values())
