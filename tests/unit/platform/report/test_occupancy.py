from __future__ import annotations

from typing import Any

import pytest

from headrace.platform.report.occupancy import occupancy, step_of

GIB = 1024**3


def move(key: str, direction: str, start: float, end: float, *, tier: str = "host", rank: int = 0) -> dict[str, Any]:
    row = {"key": key, "bytes": GIB, "tier": tier, "direction": direction, "rank": rank}
    return {**row, "submit_s": start - 0.1, "start_s": start, "end_s": end, "step": step_of(key)}


def held_at(moves: list[dict[str, Any]], time_s: float, tier: str = "host") -> float:
    curve = occupancy(moves)[tier]
    return [gib for at, gib in zip(curve.time_s, curve.gib, strict=True) if at <= time_s][-1]


def test_a_block_takes_room_from_its_store_to_the_end_of_its_last_load() -> None:
    moves = [
        move("s0.m0.l0.x.c0", "store", 10.0, 11.0),
        move("s0.m0.l1.x.c0", "store", 12.0, 13.0),
        move("s0.m0.l1.x.c0", "load", 14.0, 15.0),
        move("s0.m0.l0.x.c0", "load", 16.0, 17.0),
        move("s0.m0.l0.x.c0", "load", 18.0, 19.0),
    ]
    assert [held_at(moves, t) for t in (0.0, 1.9, 2.1, 4.9, 5.1, 8.9, 9.1)] == [1, 1, 2, 2, 1, 1, 0]
    assert "ssd" not in occupancy(moves)


def test_a_block_that_nobody_loads_stays_until_its_step_is_over() -> None:
    moves = [move("s0.m0.l0.x.c0", "store", 0.0, 1.0), move("s0.m0.l1.x.c0", "store", 2.0, 3.0)]
    assert [held_at(moves, t) for t in (0.5, 2.5, 3.5)] == [1, 2, 0]


def test_a_forwarded_blob_stays_until_the_loads_of_its_micro_batch_begin() -> None:
    moves = [
        move("s0.m0.l0.x.t0-8.call1", "store", 0.0, 1.0),
        move("s0.m0.l1.x.t0-8.call2", "store", 2.0, 3.0),
        move("s0.m0.l0.x.t0-8.call1", "load", 4.0, 5.0),
        move("s0.m1.l1.x.t0-8.call2", "store", 6.0, 7.0),  # another micro-batch: nothing of it is loaded
        move("s0.m2.l0.x.t0-8.call1", "store", 8.0, 9.0),
    ]
    assert [held_at(moves, t) for t in (1.5, 2.5, 3.9, 4.1, 5.1, 6.1, 8.1, 9.1)] == [1, 2, 2, 1, 0, 1, 2, 0]


def test_ranks_and_runs_of_the_same_step_are_not_mixed_up() -> None:
    moves = [move("s0.m0.l0.x.c0", "store", 0.0, 1.0), move("s0.m0.l0.x.c0", "load", 1.0, 2.0)]
    moves += [move("s0.m0.l0.x.c0", "store", 0.5, 1.0, rank=1), move("s0.m0.l0.x.c0", "load", 1.0, 3.0, rank=1)]
    moves += [move("s0.m0.l0.x.c0", "store", 10.0, 11.0), move("s0.m0.l0.x.c0", "load", 12.0, 13.0)]
    assert [held_at(moves, t) for t in (0.6, 2.5, 5.0, 10.5, 13.5)] == [2, 1, 0, 1, 0]


def test_the_last_steps_only() -> None:
    moves = [move(f"s{s}.m0.l0.x.c0", d, 10.0 * s + at, 10.0 * s + at + 1) for s in range(5)
             for d, at in (("store", 0.0), ("load", 3.0))]  # fmt: skip
    curve = occupancy(moves, last_steps=2)["host"]
    assert list(curve.time_s) == [0.0, 0.0, 4.0, 10.0, 14.0]
    assert list(curve.gib) == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_no_moves_no_curves() -> None:
    assert occupancy([]) == {}


@pytest.mark.parametrize(("key", "step"), [("s12.m0.l3.x.c0", 12), ("s.m0", -1), ("other", -1), ("", -1)])
def test_the_step_of_a_key(key: str, step: int) -> None:
    assert step_of(key) == step
