"""Step time, MFU and memory of plans against the length of a row, as a picture. matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.platform.report.pictures import INK, MFU_LINES, TIER_COLOR, TIER_STYLE, style_axes
from headrace.storage.core.errors import InputError
from headrace.workers.telemetry.names import HFU_PCT

PEAKS = {"device": "gpu_peak_gib", "host": "host_peak_gib", "ssd": "ssd_peak_gib"}
GIB, DPI = 1024**3, 140


def check_picture(path: Path) -> None:
    """Refuse a name that no PNG can have.

    Raises:
        InputError: it does not end in .png.
    """
    if path.suffix != ".png":
        raise InputError(f"picture={path}: the picture is a PNG; end the name with .png")


def draw_sweep(answers: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG.

    Args:
        answers: of ascending lengths, as many.answer gives them. A length that does not fit has a cross at its memory.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 8.4), layout="constrained")
    step, mfu, memory = figure.subplots(3, 1, sharex=True)
    for axes, label in ((step, "seconds of a step"), (mfu, "% of the device's peak"), (memory, "GiB per rank")):
        style_axes(axes, "tokens of a row" if axes is memory else "", label)
    fitting = [found for found in answers if found["fits"]]
    lengths = [found["seq_len"] for found in fitting]

    def line(axes: Any, name: str, **style: Any) -> None:
        known = [(n, found["predicted"][name]) for n, found in zip(lengths, fitting, strict=True)]
        known = [(n, value) for n, value in known if value is not None and (value or axes is not step)]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", markersize=4, linewidth=1.4, **style)

    line(step, "step_s", color=INK, label="step")
    if any(found["predicted"]["exposed_s"] for found in fitting):
        line(step, "exposed_s", color="#c0392b", label="exposed transfer")
    for name, (label, color) in MFU_LINES.items():
        line(mfu, name.removeprefix("perf/"), color=color, label=label, linestyle="--" if name == HFU_PCT else "-")
    for tier, name in PEAKS.items():
        if any(found["predicted"][name] for found in fitting) or tier == "device":
            line(memory, name, color=TIER_COLOR[tier], linestyle=TIER_STYLE[tier], label=tier)
    budget = answers[0]["tiers"]["device"]["budget_bytes"]
    if budget is not None:
        memory.axhline(budget / GIB, color=TIER_COLOR["device"], linestyle=":", linewidth=1, label="device budget")
    refused = [(found["seq_len"], found["predicted"]["gpu_peak_gib"]) for found in answers if not found["fits"]]
    if refused:
        memory.plot(*zip(*refused, strict=True), "x", color="#c0392b", label="does not fit")
    memory.set_xscale("log", base=2)
    memory.set_xticks([found["seq_len"] for found in answers], [tick(found["seq_len"]) for found in answers])
    step.set_yscale("log")
    for axes in (step, mfu, memory):
        if axes is not step:
            axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise InputError(f"picture={path}: cannot be written ({error.strerror}); name another file") from error


def tick(num_tokens: int) -> str:
    """Such as 512K or 4M; other lengths in full."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if num_tokens % size == 0:
            return f"{num_tokens // size}{unit}"
    return str(num_tokens)
