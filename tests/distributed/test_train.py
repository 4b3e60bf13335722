"""Two ranks over gloo: the same losses as one, one mind about stopping, and checkpoints that either can read."""

from __future__ import annotations

import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.storage.core.errors import HeadraceError
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankOutcome, RankResult
from headrace.workers.testing import run_distributed, tiny_job, tiny_leases
from headrace.workers.train import checkpoint
from headrace.workers.train.checkpoint import read_model_state
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.session import run_rank

Curve = list[tuple[int, float, float]]
NUM_STEPS = 6


def train(
    context: RankContext, job: TrainJob, stop_after: int | None = None, asking_rank: int = 0
) -> tuple[Curve, RankResult]:
    """Run the job; only `asking_rank` asks to stop, once `stop_after` steps are done."""
    curve: Curve = []

    def should_stop() -> bool:
        return context.rank == asking_rank and stop_after is not None and len(curve) >= stop_after

    def on_step(report: Any) -> None:
        curve.append((report.step, report.metrics[names.LOSS_TRAIN], report.metrics[names.GRAD_NORM]))

    warnings.simplefilter("ignore")
    result = run_rank(job, context, on_step=on_step, should_stop=should_stop)
    return curve, result


def train_with_a_full_disk(context: RankContext, job: TrainJob) -> tuple[Curve, RankResult]:
    """Rank 1 cannot write its generators."""
    if context.rank == 1:

        def no_room(device: torch.device) -> dict[str, Any]:
            raise OSError(28, "No space left on device")

        checkpoint.rng_state = no_room
    return train(context, job)


def train_without_sync(context: RankContext, job: TrainJob) -> tuple[Curve, RankResult] | str:
    """Mutant: gradients never leave the rank."""
    from torch.distributed.fsdp import FSDPModule

    real = FSDPModule.set_requires_gradient_sync
    FSDPModule.set_requires_gradient_sync = lambda self, sync, **kw: real(self, False, **kw)
    try:
        return train(context, job)
    except (HeadraceError, AttributeError, AssertionError) as error:
        return repr(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> tuple[TrainJob, Curve]:
    """Uninterrupted, with as many micro-batches as two ranks have together; a checkpoint in the middle and the end."""
    job = tiny_job(
        folder,
        run="one",
        train={"steps": NUM_STEPS, "micro_batches": 4},
        checkpoint={"every": 3, "keep": 9},
        model={"init_std": 0.1},
    )
    return job, train(RankContext(), job)[0]


def two_rank_job(folder: Path, run: str, **overrides: Any) -> TrainJob:
    overrides = {"train": {"steps": NUM_STEPS, "micro_batches": 2}, "model": {"init_std": 0.1}, **overrides}
    return tiny_job(folder, run=run, **overrides)


def assert_close(curve: Curve, expected: Curve) -> None:
    assert [step for step, _, _ in curve] == [step for step, _, _ in expected]
    for (_, loss, norm), (_, expected_loss, expected_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


@pytest.mark.parametrize("fsdp", [2, 1], ids=["sharded", "replicated"])
def test_two_ranks_equal_one_with_twice_the_micro_batches(folder: Path, one_rank, fsdp: int) -> None:
    job = two_rank_job(folder, f"fsdp{fsdp}", parallel=ParallelConfig(data=2, fsdp=fsdp))
    (curve, result), (other, _) = run_distributed(partial(train, job=job), 2)
    assert curve == other  # loss and norm are the group's, to the bit
    assert_close(curve, one_rank[1])
    assert result.stats["world_size"] == 2


def test_offload_on_two_ranks_is_bit_equal_and_each_writes_its_transfers(folder: Path) -> None:
    kept = two_rank_job(folder, "keep2", train={"steps": 3, "micro_batches": 2})
    moved = two_rank_job(folder, "ssd2", memory="offload_ssd", train={"steps": 3, "micro_batches": 2})
    [(expected, _), _] = run_distributed(partial(train, job=kept), 2)
    with tiny_leases(folder, num_ranks=2) as leases:
        [(curve, _), _] = run_distributed(partial(train, job=moved), 2, leases=leases)
    assert curve == expected
    for rank in range(2):
        assert (Path(moved.run_dir) / "ranks" / f"rank{rank}" / "transfers.parquet").stat().st_size > 1000


def test_mutant_without_gradient_sync_is_seen(folder: Path, one_rank) -> None:
    job = two_rank_job(folder, "no_sync")
    answers = run_distributed(partial(train_without_sync, job=job), 2)
    for answer in answers:
        if not isinstance(answer, str):
            assert answer[0][1][1] != pytest.approx(one_rank[1][1][1], rel=1e-5)


def test_one_rank_asks_and_all_stop_after_the_same_step_then_go_on(folder: Path, one_rank) -> None:
    job = two_rank_job(folder, "stopped")
    first = run_distributed(partial(train, job=job, stop_after=2, asking_rank=1), 2)
    assert [(result.outcome, result.last_step) for _, result in first] == [(RankOutcome.stopped, 2)] * 2
    uninterrupted = run_distributed(partial(train, job=two_rank_job(folder, "whole")), 2)
    second = run_distributed(partial(train, job=job), 2)
    for rank in range(2):
        assert first[rank][0] + second[rank][0] == uninterrupted[rank][0]
        assert second[rank][1].outcome is RankOutcome.finished


def test_a_checkpoint_of_one_rank_is_read_by_two_and_back(folder: Path, one_rank) -> None:
    """1 -> 2 -> 1 ranks: equal weights at every hand-over, the losses of the uninterrupted run, the same rows."""
    source, expected = one_rank
    job = two_rank_job(folder, "handed", checkpoint={"at_end": True, "keep": 9})
    saved = CheckpointFolder(Path(source.run_dir) / "checkpoints").path_of(3)
    target = CheckpointFolder(Path(job.run_dir) / "checkpoints")
    target.root.mkdir(parents=True)

    shutil.copytree(saved, target.path_of(3))
    [(curve, result), _] = run_distributed(partial(train, job=job, stop_after=1), 2)
    assert_close(curve, expected[3:4])
    assert "data_changed" in [event["kind"] for event in result.stats["events"]]  # rank 1 has no generator state
    assert target.committed_steps() == [4, 3]
    back = tiny_job(folder, run="handed", train={"steps": NUM_STEPS, "micro_batches": 4}, model={"init_std": 0.1})
    curve, _ = train(RankContext(), back)
    assert_close(curve, expected[4:])


def test_weights_do_not_depend_on_who_wrote_them(folder: Path) -> None:
    jobs = {n: two_rank_job(folder, f"first{n}", train={"steps": 0}, checkpoint={"at_end": True}) for n in (1, 2)}
    train(RankContext(), jobs[1])
    run_distributed(partial(train, job=jobs[2]), 2)
    one, two = (dict(read_model_state(jobs[n].run_dir)[1]) for n in (1, 2))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_rank_that_cannot_write_fails_the_save_of_all_and_not_the_run(folder: Path) -> None:
    job = two_rank_job(folder, "full", train={"steps": 2}, checkpoint={"every": 1})
    for _, result in run_distributed(partial(train_with_a_full_disk, job=job), 2):
        assert result.last_step == 2
    root = Path(job.run_dir) / "checkpoints"
    assert list(root.iterdir()) == []
    [(_, result), _] = run_distributed(partial(train, job=job), 2)
    assert result.outcome is RankOutcome.finished


def test_a_damaged_shard_is_found_by_whoever_reads_it(folder: Path) -> None:
    job = two_rank_job(folder, "damaged", checkpoint={"every": 2, "keep": 3})
    first = run_distributed(partial(train, job=job, stop_after=4), 2)
    shard = CheckpointFolder(Path(job.run_dir) / "checkpoints").path_of(4) / "state" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    second = run_distributed(partial(train, job=job), 2)
    for rank in range(2):
        assert second[rank][0][:2] == first[rank][0][2:4]
    events = {event["kind"]: event["text"] for event in second[0][1].stats["events"]}
    assert "__1_0.distcp" in events["checkpoint_damaged"]
