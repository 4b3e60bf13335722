"""Checkpoints of real runs: damaged, of another shape, on a full disk; and read without a group."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.helpers.training import Row, tiny_data
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.job import TrainJob
from headrace.workers.model.adapter import num_params
from headrace.workers.model.config import Family, ModelConfig, RopeScaling
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankOutcome
from headrace.workers.train.checkpoint import (
    CheckpointDiskFull,
    Checkpointer,
    CheckpointFailed,
)
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.group_mark import GroupMark
from headrace.workers.train.model_state import model_from_dict, model_to_dict, read_model_state


def checkpoints(run_dir: str) -> CheckpointFolder:
    return CheckpointFolder(Path(run_dir) / "checkpoints")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("state/rank_00000.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "no shard": ("state/rank_00000.safetensors", Path.unlink),
    "flipped bit": ("state/rank_00000.safetensors", flip_bit),
    "empty": ("rng_00000.json", lambda path: path.write_bytes(b"")),
}


@pytest.fixture(scope="module")
def expected(job, run_job) -> list[Row]:
    """Uninterrupted steps."""
    return run_job(job(train={"steps": 4})).curve


@pytest.fixture(scope="module")
def stopped(job, run_job, expected: list[Row]) -> TrainJob:
    """A run of four steps that was stopped after three, with checkpoints of steps 2 and 3; tests take a copy."""
    stopped = job(train={"steps": 4}, checkpoint={"every": 1, "keep": 2})
    assert run_job(stopped, stop_after=3).curve == expected[:3]
    assert checkpoints(stopped.run_dir).committed_steps() == [3, 2]
    return stopped


def copy_of(saved: TrainJob, tmp_path: Path) -> TrainJob:
    return replace(saved, run_dir=shutil.copytree(saved.run_dir, tmp_path / "run"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_names_the_damaged_file_and_goes_on_from_the_one_before(
    damage: str, stopped: TrainJob, run_job, expected: list[Row], tmp_path: Path
) -> None:
    broken = copy_of(stopped, tmp_path)
    folder = checkpoints(broken.run_dir)
    name, break_it = DAMAGES[damage]
    break_it(folder.path_of(3) / name)
    with pytest.warns(UserWarning, match="step 3 is damaged"):
        resumed = run_job(broken, attempt=1)
    assert resumed.curve == expected[2:]
    assert name in resumed.events["checkpoint_damaged"]
    assert resumed.events["resumed"] == "resumed after step 2"
    assert [event.kind for event in resumed.reports[0].events] == ["checkpoint_damaged", "resumed"]
    assert folder.committed_steps() == [4, 3]
    assert not list(folder.root.glob("*.tmp"))


@pytest.fixture(scope="module")
def both_steps(job, run_job) -> TrainJob:
    """A finished run of two steps with a checkpoint of each; tests take a copy or only read it."""
    saved = job(train={"steps": 2}, checkpoint={"every": 1, "keep": 5})
    run_job(saved)
    return saved


def test_all_damaged_stops_the_run_unless_it_is_told_to_start_over_and_the_damaged_ones_stay(
    both_steps: TrainJob, run_job, tmp_path: Path
) -> None:
    broken = copy_of(both_steps, tmp_path)
    folder = checkpoints(broken.run_dir)
    for step in folder.committed_steps():
        flip_bit(folder.path_of(step) / "state/rank_00000.safetensors")
    for attempt in (0, 1):
        with pytest.raises(InputError, check=has_id(ErrorId.checkpoint_damaged)) as caught:
            run_job(broken, attempt=attempt)
        assert "--start-over" in str(caught.value)
        assert "step_000001/state/rank_00000.safetensors" in str(caught.value)
        assert folder.committed_steps() == [2, 1]
    with pytest.warns(UserWarning, match="is damaged"):
        again = run_job(replace(broken, start_over=True), stop_after=1)
    assert [report.step for report in again.reports] == [1]
    run_job(broken)
    assert {path.name for path in folder.root.glob("*.damaged*")} == {"step_000001.damaged", "step_000002.damaged"}
    assert folder.committed_steps() == [2, 1]


def test_a_resumed_run_says_what_is_not_as_it_was(job, run_job) -> None:
    """Everything that decides which rows a step reads, one by one, and the settings of the optimizer."""
    first = job(train={"steps": 3})
    run_job(first, stop_after=1)
    saved = checkpoints(first.run_dir).path_of(1)
    kinds = {}
    for name, changed in {
        "nothing": first,
        "data.eval_fraction was 0.1, is 0.2": replace(first, data=replace(first.data, eval_fraction=0.2)),
        "train.seed was 0, is 3": replace(first, train=replace(first.train, seed=3)),
        "rows per step was 4, is 2": replace(first, train=replace(first.train, micro_batches=1)),
        "data digest was": replace(first, data=tiny_data(Path(first.run_dir).parent / "other", num_documents=40)),
        "optim.lr was 0.003, is 0.001": replace(first, optim=replace(first.optim, lr=0.001)),
        "train.steps was 3, is 4": replace(first, train=replace(first.train, steps=4)),
    }.items():
        run_dir = Path(f"{first.run_dir}-{len(kinds)}")
        shutil.copytree(saved, run_dir / "checkpoints" / saved.name)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            events = run_job(replace(changed, run_dir=str(run_dir)), stop_after=2).events
        kinds[name] = {kind for kind in ("data_changed", "settings_changed") if kind in events}
        assert any(name in str(each.message) for each in warned) == (name != "nothing")
        if name != "nothing":
            kind = "settings_changed" if name.startswith(("optim", "train.steps")) else "data_changed"
            assert name in events[kind]
    assert list(kinds.values()) == [
        set(),
        {"data_changed"},
        {"data_changed"},
        {"data_changed", "settings_changed"},
        {"data_changed"},
        {"settings_changed"},
        {"settings_changed"},
    ]


def test_another_shape_is_refused_with_tensor_and_both_shapes(both_steps: TrainJob, job, run_job) -> None:
    small = both_steps  # a run that is refused writes nothing there
    wide = replace(small, model=replace(small.model, vocab_size=small.model.vocab_size + 5))
    vocab, hidden = small.model.vocab_size, small.model.hidden_size
    with pytest.raises(InputError, match=rf"tensor model\..*\({vocab}, {hidden}\).*\({vocab + 5}, {hidden}\)"):
        run_job(wide)
    deep = job(model={"num_layers": 4}, train={"steps": 2})
    with pytest.raises(InputError, match=r"tensor model\.blocks\.3\..* is not in the checkpoint"):
        run_job(replace(deep, run_dir=small.run_dir))
    shallow = job(model={"num_layers": 2}, train={"steps": 2})
    with pytest.raises(InputError, match=r"tensor .*blocks\.2\..* is not in the model"):
        run_job(replace(shallow, run_dir=small.run_dir))
    assert checkpoints(small.run_dir).committed_steps() == [2, 1]


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int | None], None]]:
    """No file of this process may grow beyond the limit: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if num_bytes is None else num_bytes, hard))

    yield limit
    limit(None)


@pytest.mark.parametrize(
    ("limit_bytes", "file"), [(20_000, "state/rank_00000.safetensors"), (2_000, "state/rank_00000.safetensors")]
)
def test_a_full_disk_loses_one_checkpoint_and_not_the_run(
    job, run_job, file_size_limit, limit_bytes: int, file: str
) -> None:
    expected = run_job(job(train={"steps": 4})).curve
    full = job(train={"steps": 4}, checkpoint={"every": 1, "keep": 9})

    def full_disk_after_step_2(report) -> None:
        file_size_limit(limit_bytes if report.step == 2 else None)

    with pytest.warns(UserWarning, match="step 2 was not saved, the older checkpoints are kept"):
        run = run_job(full, also_on_step=full_disk_after_step_2)
    assert "The disk is full" in run.events["checkpoint_failed"]
    assert f"step_000002.tmp/{file}" in run.events["checkpoint_failed"]
    assert run.curve == expected
    folder = checkpoints(full.run_dir)
    assert folder.committed_steps() == [4, 3, 1]
    assert sorted(path.name for path in folder.root.iterdir()) == ["step_000001", "step_000003", "step_000004"]
    failures = [report.metrics.get(names.CHECKPOINT_FAILURES) for report in run.reports]
    assert failures == [None, None, 1.0, None]
    assert [names.CHECKPOINT_S in report.metrics for report in run.reports] == [False, True, False, True]


def test_a_full_disk_at_the_end_is_an_error(job, run_job, file_size_limit) -> None:
    full = job(train={"steps": 2}, checkpoint={"every": 1, "at_end": True})

    def full_disk_after_step_2(report) -> None:
        file_size_limit(20_000 if report.step == 2 else None)

    words = r"rank 0 could not write .*step_000002\.tmp/state/rank_00000\.safetensors.*disk is full.*run\.dir"
    with pytest.warns(UserWarning, match="not saved"), pytest.raises(CheckpointDiskFull, match=words) as caught:
        run_job(full, also_on_step=full_disk_after_step_2)
    assert isinstance(caught.value, MachineError)  # exit code 2
    file_size_limit(None)
    assert checkpoints(full.run_dir).committed_steps() == [1]


def test_too_little_room_is_known_before_a_byte_is_written(job, run_job, monkeypatch) -> None:
    """Of the disk's own room; the state is three fp32 tensors per weight."""
    small = job(train={"steps": 2}, checkpoint={"every": 1, "at_end": True})
    wanted = 3 * 4 * num_params(small.model)
    room = shutil.disk_usage(small.data.prepared)._replace(free=wanted - 1)
    monkeypatch.setattr("headrace.workers.train.checkpoint.shutil.disk_usage", lambda path: room)
    with (
        pytest.warns(UserWarning, match="not saved"),
        pytest.raises(CheckpointDiskFull, match=f"{wanted} bytes .* {wanted - 1} bytes free"),
    ):
        run_job(small)
    assert list(checkpoints(small.run_dir).root.iterdir()) == []
    monkeypatch.setattr("headrace.workers.train.checkpoint.shutil.disk_usage", lambda path: room._replace(free=wanted))
    run_job(small)
    assert checkpoints(small.run_dir).committed_steps() == [2, 1]


@pytest.mark.parametrize("moment", ["before it saves", "while it saves"])
def test_a_group_that_was_given_up_commits_nothing_and_leaves_the_next_one_alone(
    moment: str, job, run_job, monkeypatch
) -> None:
    """The next group starts, and writes step 2 itself, while the first one still runs."""
    old = job(train={"steps": 2}, checkpoint={"every": 1, "keep": 9})
    folder = checkpoints(old.run_dir)
    theirs = CheckpointFolder(folder.root, attempt=1).temporary_of(2)

    def take_over(step: int) -> None:
        if step == 2 and not theirs.exists():
            GroupMark(Path(old.run_dir), attempt=1)
            theirs.mkdir()
            folder.path_of(2).mkdir()  # they are about to write the marker

    def write_own(self: Checkpointer, temporary: Path, original=Checkpointer._write_own_files) -> list:
        take_over(2 if temporary.name == "step_000002.tmp" else 0)
        return original(self, temporary)

    if moment == "while it saves":
        monkeypatch.setattr(Checkpointer, "_write_own_files", write_own)
    with pytest.warns(UserWarning, match="step 2 was not saved, the older checkpoints are kept"):
        run = run_job(old, also_on_step=lambda report: moment == "before it saves" and take_over(report.step))
    assert "this group (attempt 0, " in run.events["checkpoint_failed"]
    assert folder.committed_steps() == [1]
    assert theirs.is_dir()
    assert folder.path_of(2).is_dir()


def test_what_is_no_full_disk_is_not_called_one(job, run_job, monkeypatch) -> None:
    def broken(device: torch.device) -> dict:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("headrace.workers.train.checkpoint.rng_state", broken)
    with pytest.raises(CheckpointFailed, match=r"rng_00000\.json: OSError.*Input/output error") as caught:
        run_job(job(train={"steps": 1}, checkpoint={"at_end": True}))
    assert not isinstance(caught.value, MachineError)


def test_retention_keeps_as_many_as_asked(job, run_job) -> None:
    kept = job(train={"steps": 4}, checkpoint={"every": 1, "keep": 2})
    run_job(kept)
    assert checkpoints(kept.run_dir).committed_steps() == [4, 3]


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(job, run_job) -> None:
    first = job(train={"steps": 1}, checkpoint={"at_end": True}, resume=False)
    run_job(first)
    with pytest.raises(InputError, match=r"holds checkpoints of steps \[1\].*run\.dir"):
        run_job(first)
    # A restarted group is the same run.
    assert run_job(first, attempt=1).result.outcome is RankOutcome.finished


def test_weights_are_read_without_a_group(both_steps: TrainJob, tmp_path: Path) -> None:
    saved = copy_of(both_steps, tmp_path)
    state = read_model_state(saved.run_dir)
    config, tensors, tokenizer = state.config, state.tensors, state.tokenizer
    found = dict(tensors)
    assert config == saved.model
    assert sum(tensor.numel() for tensor in found.values()) == num_params(saved.model)
    assert all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in found.values())
    older = dict(read_model_state(saved.run_dir, step=1).tensors)
    assert list(older) == list(found)
    assert not any(torch.equal(older[name], found[name]) for name in found)
    assert tokenizer is not None
    assert tokenizer.read_bytes() == (Path(saved.data.prepared) / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match=r"step 7; there is \[2, 1\]"):
        read_model_state(saved.run_dir, step=7)
    flip_bit(checkpoints(saved.run_dir).path_of(2) / "state/rank_00000.safetensors")
    with pytest.warns(UserWarning, match=r"damaged.*using step 1"):
        tensors = read_model_state(saved.run_dir).tensors
    assert all(torch.equal(tensor, older[name]) for name, tensor in tensors)


def test_reading_holds_one_tensor_at_a_time(both_steps: TrainJob) -> None:
    alive: list[weakref.ref] = []
    for _, tensor in read_model_state(both_steps.run_dir).tensors:
        assert all(ref() is None for ref in alive[:-1])
        alive.append(weakref.ref(tensor))
    assert len(alive) > 10


def test_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no committed checkpoint"):
        read_model_state(tmp_path)


def test_model_configs_survive_json() -> None:
    values = {"vocab_size": 10, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = ModelConfig(name="m", family=Family.qwen3, intermediate_size=16, rope_scaling=RopeScaling(), **values)
    as_text = json.dumps(model_to_dict(config))
    assert model_from_dict(json.loads(as_text)) == config


@pytest.mark.parametrize("mixers", ["attention", [1], [["attention"]], None])
def test_mixers_that_are_no_names_are_refused(mixers: object) -> None:
    values = {"vocab_size": 10, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    config = model_to_dict(ModelConfig(name="m", family=Family.qwen3, intermediate_size=16, **values))
    with pytest.raises(InputError, match="mixers="):
        model_from_dict({**config, "mixers": mixers})
