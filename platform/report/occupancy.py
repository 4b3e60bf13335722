"""How full the tiers were and when bytes moved, from the transfer log. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.core.outside import open_regular
from headrace.storage.core.records import Direction, Medium

GIB = 1024**3
TIERS = (Medium.host, Medium.ssd)
MAX_MOVES = 200_000
Moves = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Occupancy:
    """Bytes held over time: from `time_s[i]` (seconds since the first move) on, `gib[i]` GiB."""

    time_s: Sequence[float]
    gib: Sequence[float]


def read_moves(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The last MAX_MOVES rows of a transfer log, each with the `step` of its key, and how many rows there are.

    No rows where there is no log or it is damaged: a killed run's report shows what is there.
    """
    if not path.exists():
        return [], 0
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_regular(path) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException):
        return [], 0
    rows = table.slice(max(0, table.num_rows - MAX_MOVES)).to_pylist()
    for row in rows:
        row["step"] = step_of(row["key"])
    return rows, table.num_rows


def occupancy(moves: Moves, *, last_steps: int | None = None) -> dict[str, Occupancy]:
    """Bytes of all ranks in each tier over time; tiers without a move are left out.

    A block takes room from the start of its store to the end of the last load of the same key before the next store of
    that key. One that is never loaded was either forwarded in training, so it takes room until the first load of its
    micro-batch begins, or its pass had no loads (evaluation, an abandoned step): then until the last move of its step.

    Args:
        last_steps: only this many of the run's last steps.
    """
    rows = list(moves)
    if last_steps is not None:
        newest = sorted({row["step"] for row in rows})[-last_steps:]
        rows = last_time([row for row in rows if row["step"] in newest])
    if not rows:
        return {}
    begin_s = min(row["start_s"] for row in rows)
    found = {}
    for tier in TIERS:
        changes = _changes([row for row in rows if row["tier"] == tier.value])
        if changes:
            found[tier.value] = _accumulate(changes, begin_s)
    return found


def step_of(key: str) -> int:
    """The step in a block's key (`s12.m0.l3...`); -1 where the key is another's."""
    head = key.partition(".")[0]
    return int(head[1:]) if head.startswith("s") and head[1:].isdigit() else -1


def last_time(rows: Moves) -> list[Mapping[str, Any]]:
    """A step that was run again after a restart appears once, as it ran last."""
    last: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["rank"], row["key"], row["tier"], row["direction"])
        if key not in last or last[key]["submit_s"] <= row["submit_s"]:
            last[key] = row
    return list(last.values())


def _changes(rows: Moves) -> list[tuple[float, int]]:
    """(when, bytes more or less) of one tier."""
    step_end: dict[tuple[int, int], float] = {}
    loads_of: dict[tuple[int, str], list[float]] = {}  # starts of the loads of a micro-batch
    blocks: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        of_step = row["rank"], row["step"]
        step_end[of_step] = max(step_end.get(of_step, row["end_s"]), row["end_s"])
        blocks.setdefault((row["rank"], row["key"]), []).append(row)
        if row["direction"] == Direction.load.value:
            loads_of.setdefault((row["rank"], _pass_of(row["key"])), []).append(row["start_s"])
    for starts in loads_of.values():
        starts.sort()
    changes = []
    for moves in blocks.values():
        moves.sort(key=lambda row: row["start_s"])
        stores = [i for i, row in enumerate(moves) if row["direction"] == Direction.store.value]
        for number, at in enumerate(stores):
            store = moves[at]
            until = stores[number + 1] if number + 1 < len(stores) else len(moves)
            ends = [row["end_s"] for row in moves[at + 1 : until]]
            if not ends:
                later = loads_of.get((store["rank"], _pass_of(store["key"])), [])
                ends = later[bisect_left(later, store["end_s"]) :][:1] or [step_end[store["rank"], store["step"]]]
            end_s = max(ends)
            changes += [(store["start_s"], store["bytes"]), (max(end_s, store["start_s"]), -store["bytes"])]
    return sorted(changes)


def _pass_of(key: str) -> str:
    return ".".join(key.split(".", 2)[:2])


def _accumulate(changes: Sequence[tuple[float, int]], begin_s: float) -> Occupancy:
    time_s, gib, held = [0.0], [0.0], 0
    for when_s, num_bytes in changes:
        held += num_bytes
        time_s.append(when_s - begin_s)
        gib.append(held / GIB)
    return Occupancy(time_s, gib)
