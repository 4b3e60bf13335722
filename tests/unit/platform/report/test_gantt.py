"""The picture of one step: which bars it has, and in which lanes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.platform.report.gantt import Bar, _rows, read_step, step_picture
from headrace.platform.report.occupancy import read_moves

MakeRun = Callable[..., Path]


def span(micro_batch: int, what: str, layer: int, start_s: float, end_s: float) -> dict[str, Any]:
    return {"micro_batch": micro_batch, "what": what, "layer": layer, "start_s": start_s, "end_s": end_s}


def write_timeline(folder: Path, rank: int, step: int, spans: list[dict[str, Any]]) -> None:
    path = folder / "ranks" / f"rank{rank}" / "timeline.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step": step, "spans": spans}))


def test_compute_and_moves_of_one_step_lie_in_lanes(make_run: MakeRun) -> None:
    folder = make_run(3)  # moves of step 2 begin at 4.0, 4.1, 5.0 and 5.1
    spans = [span(0, "forward", 0, 3.95, 4.1), span(0, "backward", 0, 5.0, 5.2), span(0, "update", -1, 5.2, 5.4)]
    write_timeline(folder, 0, 2, spans)
    write_timeline(folder, 10, 2, [])
    step = read_step(folder, read_moves(folder / "transfers.parquet")[0])
    assert step is not None
    assert step.title == "Step 3 of rank 0"
    assert list(step.lanes) == ["compute", "host store", "host load", "ssd store", "ssd load"]
    assert [bar.what for bar in step.lanes["compute"]] == ["forward", "backward", "update"]
    assert step.lanes["ssd load"] == [Bar("load", 1, 5.1, 5.1 + 0.05)]
    picture = step_picture(step)
    for words in ("compute", "ssd load", "forward of a block", "update of the weights", "seconds since its start"):
        assert words in picture, words


def test_of_several_micro_batches_the_last_one_is_shown(make_run: MakeRun) -> None:
    folder = make_run(1, moves=False)
    write_timeline(folder, 0, 0, [span(i, "forward", layer, i, i + 0.5) for i in range(3) for layer in range(2)])
    step = read_step(folder, [])
    assert step is not None
    assert step.title == "Step 1 of rank 0, the last of 3 micro-batches"
    assert [bar.start_s for bar in step.lanes["compute"]] == [2, 2]


def test_moves_of_an_earlier_process_are_left_out(make_run: MakeRun) -> None:
    folder = make_run(3)
    write_timeline(folder, 0, 2, [span(0, "forward", 0, 900.0, 901.0)])
    step = read_step(folder, read_moves(folder / "transfers.parquet")[0])
    assert step is not None
    assert list(step.lanes) == ["compute"]


def test_without_a_whole_timeline_the_moves_are_shown(make_run: MakeRun) -> None:
    folder = make_run(3)
    for text in (None, "{", '{"step": 1, "spans": [{"what": "forward"}]}', '{"step": 1, "spans": []}'):
        if text is not None:
            write_timeline(folder, 0, 0, [])
            (folder / "ranks" / "rank0" / "timeline.json").write_text(text)
        step = read_step(folder, read_moves(folder / "transfers.parquet")[0])
        assert step is not None
        assert (step.step, list(step.lanes)) == (2, ["host store", "host load", "ssd store", "ssd load"])
    assert read_step(folder, []) is None


def test_bars_that_overlap_lie_in_different_rows() -> None:
    bars = [Bar("store", 0, 0.0, 2.0), Bar("store", 1, 1.0, 3.0), Bar("store", 2, 2.0, 4.0), Bar("store", 3, 5.0, 6.0)]
    assert _rows(bars) == [0, 1, 0, 0]
    assert max(_rows([Bar("load", i, 0.0, 9.0) for i in range(20)])) == 3


def test_moves_alone_are_those_of_the_last_step_as_it_ran_last(tmp_path: Path) -> None:
    def move(key: str, direction: str, start: float, end: float, rank: int = 0) -> dict[str, Any]:
        row = {"key": key, "tier": "host", "direction": direction, "rank": rank}
        return {**row, "submit_s": start, "start_s": start, "end_s": end}

    moves = [
        move("s1.m0.l0.x.c0", "store", 0.0, 1.0),
        move("s2.m0.l0.x.c0", "store", 3.0, 4.0),
        move("s2.m0.l0.x.c0", "store", 13.0, 14.0),
        move("s2.m0.l0.x.c0", "load", 15.0, 16.5),
        move("s2.m0.l0.x.c0", "load", 15.0, 19.0, rank=1),
    ]
    step = read_step(tmp_path, moves)
    assert step is not None
    assert step.lanes == {"host store": [Bar("store", 0, 13.0, 14.0)], "host load": [Bar("load", 0, 15.0, 16.5)]}
