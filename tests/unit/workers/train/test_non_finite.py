"""A step whose loss is not finite: it is written down, and stops the run or changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId
from headrace.workers.data.loader import open_loader
from headrace.workers.job import TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.telemetry import names
from headrace.workers.train.checkpoint_folder import CheckpointFolder, Manifest
from headrace.workers.train.engine import TrainEngine
from headrace.workers.train.non_finite import TrainingDiverged
from headrace.workers.train.state_files import StateReader

NUM_STEPS, BAD_STEP, BAD_MICRO_BATCH = 5, 2, 1
SKIP = {"steps": NUM_STEPS, "non_finite": "skip"}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Make the loss of some rows NaN, wherever they are read."""
    forward = ByLayer._forward
    poisoned: list[torch.Tensor] = []

    def bad(self: ByLayer, batch):
        loss = forward(self, batch)
        return loss * float("nan") if any(torch.equal(batch.tokens, tokens) for tokens in poisoned) else loss

    monkeypatch.setattr(ByLayer, "_forward", bad)

    def choose(job, *steps: int) -> list[list[list[int]]]:
        loader = open_loader(job.data, train=job.train, rank=0, world_size=1)
        poisoned.extend(loader.step_batches(step)[BAD_MICRO_BATCH].tokens for step in steps)
        return [loader.index.rank_rows(step, 0).tolist() for step in steps]

    return choose


@pytest.fixture
def skip_job(job):
    from headrace.workers.train.config import NonFinite

    def make(**train):
        words = {**SKIP, **train}
        return job(train={**words, "non_finite": NonFinite(words["non_finite"])}, checkpoint={"at_end": True})

    return make


def state_of(job) -> dict[str, np.ndarray]:
    """Weights and moments of the newest checkpoint."""
    import torch.distributed.checkpoint as dcp

    folder = CheckpointFolder(Path(job.run_dir) / "checkpoints")
    state = folder.path_of(folder.committed_steps()[0]) / "state"
    tensors = {name: torch.empty(shape) for name, shape in StateReader(state).shapes().items()}
    dcp.load(tensors, storage_reader=StateReader(state), no_dist=True)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def test_the_run_stops_and_the_rows_of_the_step_are_listed(skip_job, run_job, poison) -> None:
    stopping = skip_job(non_finite="stop")
    (rows,) = poison(stopping, BAD_STEP)
    with pytest.raises(TrainingDiverged, check=has_id(ErrorId.training_diverged)) as caught:
        run_job(stopping)
    path = Path(stopping.run_dir) / "non_finite" / f"step_{BAD_STEP + 1:06d}.json"
    assert str(path) in str(caught.value)
    assert "train.non_finite=skip" in str(caught.value)
    record = json.loads(path.read_text())
    assert (record["step"], record["loss"]) == (BAD_STEP + 1, "nan")
    assert [each["rows"] for each in record["micro_batches"]] == rows
    assert [each["loss_is_finite"] for each in record["micro_batches"]] == [True, False]
    assert CheckpointFolder(Path(stopping.run_dir) / "checkpoints").committed_steps() == []


def test_a_skipped_step_is_as_if_it_had_never_been_there(skip_job, run_job, poison, monkeypatch) -> None:
    """Against a run whose engine does not hear of the step: weights, moments, losses after it, to the bit."""
    skipped, without = skip_job(), skip_job()
    poison(skipped, BAD_STEP)
    run = run_job(skipped)
    train_step = TrainEngine.train_step

    def never_called(self, step, batches, totals):
        if step != BAD_STEP:
            return train_step(self, step, batches, totals)
        nan = float("nan")
        from headrace.workers.train.engine import StepResult

        return StepResult(nan, nan, 0.0)

    monkeypatch.setattr(TrainEngine, "train_step", never_called)
    other = run_job(without)
    keep = [names.LOSS_TRAIN, names.GRAD_NORM, names.SKIPPED_STEPS]
    assert [[r.metrics.get(key) for key in keep] for r in run.reports] == [
        [r.metrics.get(key) for key in keep] for r in other.reports
    ]
    first, second = state_of(skipped), state_of(without)
    assert any(name.startswith("optim.") for name in first)
    assert all(np.array_equal(first[name], second[name]) for name in second)


def test_a_skipped_step_is_counted_and_has_neither_loss_nor_norm(skip_job, run_job, poison) -> None:
    skipped = skip_job()
    poison(skipped, BAD_STEP, BAD_STEP + 2)
    run = run_job(skipped)
    there = [names.LOSS_TRAIN in report.metrics for report in run.reports]
    assert there == [step not in (BAD_STEP, BAD_STEP + 2) for step in range(NUM_STEPS)]
    assert [names.GRAD_NORM in report.metrics for report in run.reports] == there
    assert [int(r.metrics[names.SKIPPED_STEPS]) for r in run.reports] == [0, 0, 1, 1, 2]
    events = [event for report in run.reports for event in report.events if event.kind == "step_skipped"]
    assert [event.facts["step"] for event in events] == [BAD_STEP + 1, BAD_STEP + 3]
    assert len(list((Path(skipped.run_dir) / "non_finite").iterdir())) == 2


def test_a_resume_over_a_skipped_step_changes_nothing(skip_job, run_job, poison) -> None:
    """Interrupted before, right behind and later than the skipped step: the bias correction counts updates."""
    whole = skip_job()
    poison(whole, BAD_STEP)
    expected = run_job(whole).curve
    for stop_after in (BAD_STEP, BAD_STEP + 1, BAD_STEP + 2):
        check_resume(stop_after, expected, whole, skip_job(), run_job)


def check_resume(stop_after: int, expected: list[Any], whole: TrainJob, interrupted: TrainJob, run_job: Any) -> None:
    first = run_job(interrupted, stop_after=stop_after).curve
    folder = CheckpointFolder(Path(interrupted.run_dir) / "checkpoints")
    manifest = folder.read_manifest(stop_after)
    assert isinstance(manifest, Manifest)
    assert manifest.facts["num_skipped"] == int(stop_after > BAD_STEP)
    assert first + run_job(interrupted, attempt=1).curve == expected
    first_state, second_state = state_of(whole), state_of(interrupted)
    assert all(np.array_equal(first_state[name], second_state[name]) for name in first_state)


def test_mutant_a_resume_that_counts_the_skipped_step_is_seen(skip_job, run_job, poison, monkeypatch) -> None:
    whole, interrupted = skip_job(), skip_job()
    poison(whole, BAD_STEP)
    expected = run_job(whole).curve
    first = run_job(interrupted, stop_after=BAD_STEP + 1).curve
    monkeypatch.setattr("headrace.workers.train.loop.NUM_SKIPPED", "forgotten")
    assert first + run_job(interrupted, attempt=1).curve != expected


def test_the_bound_holds_over_a_resume(skip_job, run_job, poison) -> None:
    bounded = skip_job(max_skipped_steps=1)
    poison(bounded, BAD_STEP, BAD_STEP + 2)
    run_job(bounded, stop_after=BAD_STEP + 1)
    with pytest.raises(TrainingDiverged, match="max_skipped_steps=1"):
        run_job(bounded, attempt=1)


def test_a_step_without_targets_has_no_loss(job, run_job, monkeypatch) -> None:
    """Its targets are all masked: 0 would be a loss that nobody computed."""
    empty = job(train={"steps": 3})
    from headrace.workers.data.loader import TokenLoader

    read = TokenLoader.step_batches

    def masked(self, step: int):
        batches = read(self, step)
        if step == 1:
            for batch in batches:
                batch.targets.fill_(-100)
        return batches

    monkeypatch.setattr(TokenLoader, "step_batches", masked)
    run = run_job(empty)
    assert [names.LOSS_TRAIN in report.metrics for report in run.reports] == [True, False, True]
    assert run.reports[1].metrics[names.GRAD_NORM] == 0.0
    assert run.reports[1].events[0].facts["step"] == 2


def test_a_rank_says_what_it_is_doing(job) -> None:
    from headrace.workers.job import RankContext
    from headrace.workers.telemetry.records import Stage, StepPart
    from headrace.workers.train.session import run_rank

    stages: list[Stage] = []
    parts: dict[Stage, list[str]] = {}

    def on_stage(stage: Stage, part: StepPart | None = None) -> None:
        if part is None:
            stages.append(stage)
        else:
            parts.setdefault(stage, []).append(str(part))

    told = job(train={"steps": 1, "eval_every": 1, "micro_batches": 2}, checkpoint={"at_end": True})
    run_rank(told, RankContext(), on_step=lambda _: None, should_stop=lambda: False, on_stage=on_stage)
    assert stages == list(Stage)
    num_layers = told.model.num_layers
    layers = [f"layer {number}/{num_layers}" for number in range(1, num_layers + 1)]
    passes = [f"micro-batch {n}/2, stage {stage}/2, " for n in (1, 2) for stage in (1, 2)]
    assert parts[Stage.compute] == [which + layer for which in passes for layer in layers]
    assert parts[Stage.evaluate] == [
        f"micro-batch {n}/{told.train.eval_batches}, stage 1/1, {layer}"
        for n in range(1, told.train.eval_batches + 1)
        for layer in layers
    ]
