"""Several trackers at once: one that fails costs nothing, and TensorBoard and W&B have what metrics.jsonl has."""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace.platform.config.load import load_run_config
from headrace.platform.control.sweep import read_grid
from headrace.platform.tracking import copier, recorder, trackers
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.recorder import RunRecorder
from headrace.platform.tracking.run_folder import STEP, read_metrics
from headrace.platform.tracking.trackers import check_packages
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import StepReport

Make = Callable[..., RunRecorder]
MakeReport = Callable[..., StepReport]


def installed(package: str) -> pytest.MarkDecorator:
    why = f"{package} is not installed: pip install 'headrace[{package}]'"
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=why)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copier, "FLUSH_EVERY_S", 0.05)
    monkeypatch.setattr(copier, "FINISH_AFTER_FAILURE_S", 1.0)
    monkeypatch.setattr(recorder, "_write_report", lambda run_dir: None)


@dataclass
class Kept:
    """A tracker that keeps what it is sent, or fails at every call."""

    name: str
    fails: bool = False
    look: str = "in this test"
    run_id: str = "run"
    sent: list[Any] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @property
    def tracking_uri(self) -> str:
        return f"here/{self.name}"

    @property
    def state_file(self) -> str:
        return f"{self.name}.json"

    def open_run(self, run_id: str | None) -> Kept:
        if self.fails:
            raise OSError("its disk is full")
        return self

    def describe(self) -> None: ...

    def points(self, line) -> list[Any]:
        return [line[STEP]]

    def log(self, points) -> None:
        self.sent += points

    def sample_system(self, num_samples: int) -> int:
        return num_samples

    def close(self, status, artifacts, tags) -> None:
        self.closed.append(status)


def test_a_tracker_that_fails_costs_the_others_nothing(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, monkeypatch, capfd
) -> None:
    good, bad, other = Kept("good"), Kept("bad", fails=True), Kept("other")
    monkeypatch.setattr(recorder, "trackers_of", lambda *_: [good, bad, other])
    run = make_recorder()
    run.start("a: 1\n", plan, {})
    for step in range(1, 8):
        run.on_report(make_report(step))
    words = run.finish("finished", {})
    assert good.sent == other.sent == list(range(1, 8))
    assert good.closed == other.closed == ["FINISHED"]
    assert [line[STEP] for line in read_metrics(run.run_dir / "metrics.jsonl")] == list(range(1, 8))
    assert f"bad         is not complete (OSError: its disk is full): headrace mlflow --send {run.run_dir}" in words
    assert capfd.readouterr().err.count("bad at here/bad refuses the run") == 1


@pytest.mark.parametrize(
    ("word", "on"),
    [
        ("tracking=[mlflow,tensorboard]", {"mlflow", "tensorboard"}),
        ("tracking=[wandb, mlflow]", {"mlflow", "wandb"}),
        ("tracking=tensorboard", {"tensorboard"}),
        ("tracking=files", set()),
    ],
)
def test_the_word_chooses_one_or_several(word: str, on: set[str]) -> None:
    tracking = load_run_config([word], environ={}).config.tracking
    assert {name for name in ("mlflow", "tensorboard", "wandb") if getattr(tracking, name)} == on


def test_several_trackers_are_no_axis_of_a_sweep() -> None:
    grid = read_grid(["tracking=[mlflow,tensorboard]", "optim.lr=1,2"])
    assert [run.words for run in grid.runs] == [("tracking=[mlflow,tensorboard]", f"optim.lr={lr}") for lr in (1, 2)]


def test_a_recipe_may_choose_several(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults:\n  - override /tracking: [mlflow, wandb]\ntrain: {steps: 3}\n")
    tracking = load_run_config([f"conf={recipe}"], environ={}).config.tracking
    assert (tracking.mlflow, tracking.tensorboard, tracking.wandb) == (True, False, True)


@pytest.mark.parametrize(
    ("word", "said"),
    [("tracking=[mlflow,tensorbord]", "did you mean `tensorboard`"), ("model=[tiny,qwen3_8b]", "no such choice")],
)
def test_a_wrong_list_is_named(word: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_run_config([word], environ={})


@pytest.mark.parametrize("package", trackers.OPTIONAL)
def test_a_package_that_is_missing_is_named_with_its_command(package: str, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_packages(TrackingConfig(mlflow=True))
    with pytest.raises(MachineError, match=rf"pip install 'headrace\[{package}\]'") as refused:
        check_packages(TrackingConfig(**{package: True}))
    assert refused.value.id is ErrorId.package_missing


def two_starts(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, **config: Any) -> RunRecorder:
    """Five steps, then a resumed run that does two of them again and two more."""
    for steps in (range(1, 6), range(4, 8)):
        run = make_recorder(**config)
        run.start("optim: {lr: 0.1}\n", plan, {})
        for step in steps:
            run.on_report(make_report(step, **{"nan/x": math.nan, "perf/hfu_pct": 2.0 * step}))
        run.finish("finished", {})
    return run


@installed("tensorboard")
def test_tensorboard_has_every_step_once(make_recorder: Make, make_report: MakeReport, plan: MemoryPlan) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run = two_starts(make_recorder, make_report, plan, tensorboard=True)
    found = EventMultiplexer().AddRunsFromDirectory(str(run.run_dir.parent)).Reload()
    (board,) = found.Runs()
    assert board == "one/tensorboard"
    scalars = {name: [(e.step, e.value) for e in found.Scalars(board, name)] for name in found.Runs()[board]["scalars"]}
    assert scalars["perf/hfu_pct"] == [(step, 2.0 * step) for step in range(1, 8)]
    assert scalars[names.LOSS_TRAIN] == [(s, pytest.approx(10.0 / s, rel=1e-6)) for s in range(1, 8)]
    assert "nan/x" not in scalars
    times = {event.step: event.wall_time for event in found.Scalars(board, names.LOSS_TRAIN)}
    lines = {line[STEP]: line["unix_s"] for line in read_metrics(run.run_dir / "metrics.jsonl")}
    assert all(times[step] == pytest.approx(lines[step], abs=1e-3) for step in (1, 2, 3, 6, 7))
    (text,) = found.Tensors(board, "config/text_summary")[:1]
    assert b"lr: 0.1" in text.tensor_proto.string_val[0]


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: after 7 bytes, LevelDB's log format (blocks of 32 KiB; crc, length, type)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or 32768 - at % 32768 < 7:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@installed("wandb")
def test_wandb_offline_has_every_step_once(
    make_recorder: Make, make_report: MakeReport, plan: MemoryPlan, monkeypatch
) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = two_starts(make_recorder, make_report, plan, wandb=True, experiment="river")
    steps: dict[int, str] = {}
    runs = set()
    for path in sorted(run.run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                runs.add((record.run.project, record.run.run_id, record.run.display_name))
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                assert "nan/x" not in items
                step = int(items["_step"])
                assert step not in steps
                steps[step] = items["perf/hfu_pct"]
    assert {step: float(value) for step, value in steps.items()} == {step: 2.0 * step for step in range(1, 8)}
    assert len(runs) == 1
    ((project, _, shown),) = runs
    assert (project, shown) == ("river", "one")
