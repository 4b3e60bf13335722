"""The picture of one step: what computed and what moved, block by block, one lane for each kind of work. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.platform.report.occupancy import TIERS, Moves, last_time
from headrace.platform.report.pictures import draw_svg, new_figure
from headrace.platform.tracking.run_folder import read_json
from headrace.storage.core.records import Direction
from headrace.workers.train.timeline_file import BACKWARD, FORWARD, HEAD, TIMELINE_FILE, UPDATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTE = "compute"
COLOR = {
    FORWARD: "#2f7fb8",
    HEAD: "#9aa5b1",
    BACKWARD: "#7b5ea7",
    UPDATE: "#52606d",
    "store": "#d9822b",
    "load": "#3a9d6e",
}
MEANING = {
    FORWARD: "forward of a block",
    HEAD: "norm, head and loss",
    BACKWARD: "backward of a block, recomputation included",
    UPDATE: "update of the weights",
    "store": "store of a block's tensors",
    "load": "load of a block's tensors",
}
# Moves of one lane that overlap lie below each other, in so many rows at most.
MAX_ROWS = 4
_KEY = re.compile(r"s(?P<step>\d+)\.m(?P<micro_batch>\d+)\.l(?P<layer>\d+)\.")


@dataclass(frozen=True)
class Bar:
    """One piece of work. Times are seconds of the rank's clock; `what` is a key of MEANING."""

    what: str
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepLanes:
    """What one rank did in one micro-batch of one step, by lane: `compute`, then tier and direction."""

    rank: int
    step: int
    num_micro_batches: int
    lanes: Mapping[str, Sequence[Bar]]

    @property
    def title(self) -> str:
        """Which step it is, for people, who count steps from 1."""
        part = "" if self.num_micro_batches == 1 else f", the last of {self.num_micro_batches} micro-batches"
        return f"Step {self.step + 1} of rank {self.rank}{part}"


def read_step(run_dir: Path, moves: Moves) -> StepLanes | None:
    """The newest step that the lowest rank has a timeline of; without one, as after a kill, the moves alone.

    None where nothing computed and nothing moved, or all of it is damaged.
    """
    for path in sorted(run_dir.glob(f"ranks/rank*/{TIMELINE_FILE}"), key=lambda path: (len(path.parent.name), path)):
        found = read_json(path)
        try:
            rank, step = int(path.parent.name.removeprefix("rank")), int(found["step"])
            last = max(int(span["micro_batch"]) for span in found["spans"])
            bars = [
                Bar(str(x["what"]), int(x["layer"]), float(x["start_s"]), float(x["end_s"]))
                for x in found["spans"]
                if x["micro_batch"] == last and x["what"] in MEANING
            ]
            window = min(bar.start_s for bar in bars), max(bar.end_s for bar in bars)
        except (KeyError, TypeError, ValueError):
            continue
        return StepLanes(rank, step, last + 1, {COMPUTE: bars, **_moves_of(moves, rank, step, last, window)})
    moves = last_time(moves)
    keys = [(row, key) for row in moves if (key := _KEY.match(str(row["key"]))) is not None]
    if not keys:
        return None
    rank = min(row["rank"] for row, _ in keys)
    step, last = max((int(key["step"]), int(key["micro_batch"])) for row, key in keys if row["rank"] == rank)
    return StepLanes(rank, step, last + 1, _moves_of(moves, rank, step, last, (-math.inf, math.inf)))


def step_picture(step: StepLanes) -> str:
    """The lanes over time; a bar carries the number of its block where there is room."""
    begin_s = min(bar.start_s for bars in step.lanes.values() for bar in bars)
    whole_s = max(bar.end_s for bars in step.lanes.values() for bar in bars) - begin_s
    unit, scale = ("seconds", 1.0) if whole_s >= 1.0 else ("milliseconds", 1e3)
    rows = {lane: _rows(bars) for lane, bars in step.lanes.items()}
    num_rows = sum(max(row) + 1 for row in rows.values())
    figure, axes = new_figure(f"{unit} since its start", "", width=13.4, height=0.32 * num_rows + 1.5)
    ticks, top = [], 0.0
    for lane, bars in step.lanes.items():
        for bar, row in zip(bars, rows[lane], strict=True):
            _draw(axes, bar, top + row, begin_s, scale, whole_s)
        num = max(rows[lane]) + 1
        ticks.append((top + (num - 1) / 2, lane))
        top += num + 0.4
    axes.set_yticks([at for at, _ in ticks], [lane for _, lane in ticks])
    axes.set_ylim(top - 0.5, -0.9)
    axes.set_xlim(-0.005 * whole_s * scale, 1.005 * whole_s * scale)
    axes.grid(axis="y", visible=False)
    for what in MEANING:
        if any(bar.what == what for bars in step.lanes.values() for bar in bars):
            axes.bar(0, 0, color=COLOR[what], label=MEANING[what])
    return draw_svg(figure, num_columns=6)


def _draw(axes: Axes, bar: Bar, row: float, begin_s: float, scale: float, whole_s: float) -> None:
    start, width = (bar.start_s - begin_s) * scale, (bar.end_s - bar.start_s) * scale
    axes.barh(row, width, left=start, height=0.86, color=COLOR[bar.what], edgecolor="white", linewidth=0.4)
    if bar.layer >= 0 and bar.what != HEAD and width > 0.016 * whole_s * scale:
        axes.text(start + width / 2, row, str(bar.layer), ha="center", va="center", color="white", fontsize=8)
    elif bar.what in (HEAD, UPDATE) and width > 0.05 * whole_s * scale:
        axes.text(start + width / 2, row, bar.what, ha="center", va="center", color="white", fontsize=8)


def _moves_of(
    moves: Moves, rank: int, step: int, micro_batch: int, window: tuple[float, float]
) -> dict[str, list[Bar]]:
    found: dict[str, list[Bar]] = {f"{tier.value} {direction.value}": [] for tier in TIERS for direction in Direction}
    for row in moves:
        key = _KEY.match(str(row["key"]))
        if key is None or row["rank"] != rank or (int(key["step"]), int(key["micro_batch"])) != (step, micro_batch):
            continue
        if window[0] <= row["start_s"] <= window[1]:  # else it is of the same step in an earlier process
            bar = Bar(row["direction"], int(key["layer"]), row["start_s"], row["end_s"])
            found[f"{row['tier']} {row['direction']}"].append(bar)
    return {lane: sorted(bars, key=lambda bar: bar.start_s) for lane, bars in found.items() if bars}


def _rows(bars: Sequence[Bar]) -> list[int]:
    """A row for every bar, so that bars that overlap lie in different ones."""
    ends: list[float] = []
    rows = []
    for bar in bars:
        free = next((row for row, end_s in enumerate(ends) if end_s <= bar.start_s), None)
        if free is None and len(ends) < MAX_ROWS:
            ends.append(0.0)
            free = len(ends) - 1
        row = ends.index(min(ends)) if free is None else free
        ends[row] = max(ends[row], bar.end_s)
        rows.append(row)
    return rows
