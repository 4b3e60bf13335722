"""A simulated step as a picture and as a Chrome trace. matplotlib without a display; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from headrace.platform.planning.simulate.engine import Event, Stream, What
from headrace.platform.planning.simulate.step import StepTimeline
from headrace.platform.report.pictures import INK, new_figure
from headrace.storage.core.errors import InputError

COLOR = {
    What.forward: "#2f7fb8",
    What.head: "#9aa5b1",
    What.backward: "#7b5ea7",
    What.weight_grad: "#b29bd1",
    What.vocabulary: "#c05a7a",
    What.store: "#d9822b",
    What.load: "#3a9d6e",
    What.tensor: "#4d5b69",
    What.context: "#1f9e9e",
    What.weights: "#a98d3f",
    What.pipeline: "#d05353",
}
# So many roles in a picture at most.
MOST_ROLES = 8
WIDTH, LANE, DPI = 14.0, 0.24, 130
Bars = list[tuple[float, float]]


def draw_timeline(timeline: StepTimeline, title: str, path: Path) -> None:
    """Write a PNG: for each role a lane for each of its streams, over seconds.

    Raises:
        InputError: the file cannot be written, or its name does not end in .png.
    """
    if path.suffix != ".png":
        raise InputError(f"timeline={path}: the picture is a PNG; end the name with .png")
    roles = _shown_roles(timeline)
    lanes = [
        (role, stream)
        for role in roles
        for stream in Stream
        if any(event.role == role and event.stream is stream for event in timeline.events)
    ]
    figure, axes = new_figure("seconds", "", width=WIDTH, height=max(2.2, LANE * len(lanes) + 1.6))
    ticks: list[tuple[float, str]] = []
    top = 0.0
    for place, (role, stream) in enumerate(lanes):
        if place and lanes[place - 1][0] != role:
            top += 0.7
        for what, bars in _bars(timeline, role, stream).items():
            for edge, drawn in bars.items():
                axes.broken_barh(drawn, (top - 0.42, 0.84), facecolors=COLOR[what], edgecolors="white", linewidth=edge)
        name = f"{timeline.roles[role]}: " if len(roles) > 1 and (not place or lanes[place - 1][0] != role) else ""
        ticks.append((top, f"{name}{stream.value}  {100 * timeline.busy_share(role, stream):.0f} %"))
        top += 1.0
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(top - 0.4, -0.6)
    axes.set_xlim(0.0, timeline.shown_s or 1.0)
    axes.grid(axis="y", visible=False)
    for what in What:
        if any(event.what is what for event in timeline.events):
            axes.bar(0, 0, color=COLOR[what], label=what.value)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=9, labelcolor=INK)
    notes = [f"a step takes {timeline.step_s:.4g} s", "percent: share of the time shown that a lane is busy"]
    axes.set_title(
        "\n".join([title, "; ".join([*notes, *filter(None, [timeline.note])])]), fontsize=10, color=INK, loc="left"
    )
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise InputError(f"timeline={path}: cannot be written ({error.strerror}); name another file") from error


def write_trace(timeline: StepTimeline, path: Path) -> None:
    """Write the events as a Chrome trace (chrome://tracing, Perfetto): a process for each role, a thread per stream.

    Raises:
        InputError: the file cannot be written.
    """
    streams = list(Stream)
    rows: list[dict[str, object]] = []
    for role, name in enumerate(timeline.roles):
        rows.append({"ph": "M", "name": "process_name", "pid": role, "args": {"name": name}})
        rows += [
            {"ph": "M", "name": "thread_name", "pid": role, "tid": number, "args": {"name": stream.value}}
            for number, stream in enumerate(streams)
        ]
    rows += [
        {
            "ph": "X",
            "name": f"{event.what.value} {event.label}".strip(),
            "cat": event.what.value,
            "pid": event.role,
            "tid": streams.index(event.stream),
            "ts": event.start_s * 1e6,
            "dur": (event.end_s - event.start_s) * 1e6,
        }
        for event in timeline.events
    ]
    try:
        path.write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise InputError(f"trace={path}: cannot be written ({error.strerror}); name another file") from error


def _shown_roles(timeline: StepTimeline) -> Sequence[int]:
    number = len(timeline.roles)
    if number <= MOST_ROLES:
        return range(number)
    return sorted({round(place * (number - 1) / (MOST_ROLES - 1)) for place in range(MOST_ROLES)})


def _bars(timeline: StepTimeline, role: int, stream: Stream) -> dict[What, dict[float, Bars]]:
    """(start, width) of the bars of a lane, by the width of their edge in points.

    Neighbours that a pixel could not tell apart are one bar, and none is thinner than two pixels.
    """
    pixel_s = timeline.shown_s / (WIDTH * DPI)
    found: dict[What, Bars] = {}
    for event in _of_lane(timeline.events, role, stream):
        bars = found.setdefault(event.what, [])
        if bars and event.start_s - sum(bars[-1]) < pixel_s and bars[-1][1] < 6 * pixel_s:
            bars[-1] = (bars[-1][0], event.end_s - bars[-1][0])
        else:
            bars.append((event.start_s, event.end_s - event.start_s))
    wide = {what: [bar for bar in bars if bar[1] >= 6 * pixel_s] for what, bars in found.items()}
    return {
        what: {0.5: wide[what], 0.0: [(at, max(2 * pixel_s, width)) for at, width in bars if width < 6 * pixel_s]}
        for what, bars in found.items()
    }


def _of_lane(events: Iterable[Event], role: int, stream: Stream) -> list[Event]:
    return sorted((e for e in events if e.role == role and e.stream is stream), key=lambda event: event.start_s)
