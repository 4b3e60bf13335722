from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.workers.train.step_trace import OUR_PID, STEP_MARK, StepProfiler


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_profiled_step_shows_operators_blocks_and_transfers_on_one_clock(
    job: Callable[..., Any], run_job: Callable[..., Any], leases: Any
) -> None:
    one = job(memory="offload_host", train={"steps": 3, "profile": [2]})
    plain = job(memory="offload_host", train={"steps": 3})
    assert run_job(one, leases=leases).curve == run_job(plain, leases=leases).curve
    assert [path.name for path in Path(one.run_dir).rglob("trace_*")] == ["trace_step2.json.gz"]
    assert not list(Path(plain.run_dir).rglob("trace_*"))
    events = read(Path(one.run_dir) / "ranks" / "rank0" / "trace_step2.json.gz")
    (mark,) = [event for event in events if event.get("name") == STEP_MARK and event["ph"] == "X"]
    begin, end = mark["ts"], mark["ts"] + mark["dur"]
    ours = [event for event in events if event["pid"] == OUR_PID and event["ph"] in "Xbe"]
    # Python's own work between reading a clock and the mark.
    assert all(begin - 5e3 <= event["ts"] <= end + 5e3 for event in ours)
    num_layers = one.model.num_layers
    names = {event["name"] for event in ours if event["ph"] == "X"}
    assert {f"{what} {layer}" for what in ("forward", "backward") for layer in range(num_layers)} < names
    stores = [event for event in ours if event["ph"] == "b" and event["cat"] == "host store"]
    assert len(stores) == one.train.micro_batches * (num_layers - 1)  # the last block's input stays
    assert all(event["name"].startswith("s1.") for event in stores)
    # A matrix product of the first block lies inside its forward.
    forward = next(event for event in ours if event["name"] == "forward 0")
    products = [e for e in events if e.get("name") == "aten::mm" and e["ph"] == "X"]
    assert any(forward["ts"] <= e["ts"] <= forward["ts"] + forward["dur"] for e in products)


def test_a_full_disk_costs_the_trace_and_not_the_run(
    job: Callable[..., Any], run_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StepProfiler, "_write", full)
    with pytest.warns(UserWarning, match="trace could not be written"):
        run = run_job(job(train={"steps": 1, "profile": [1]}))
    assert len(run.curve) == 1
