"""Rows of several lengths on two ranks over gloo: one length at a time, the losses of one rank, an exact resume."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from headrace.helpers.buckets import FAR, plan_of_length, tiny_bucket_job
from headrace.helpers.training import RecordedRun, run_distributed, run_recorded, tiny_leases
from headrace.storage.core.ports import free_port
from headrace.workers.data.batch import TokenBatch
from headrace.workers.data.bucket_reader import BucketReader
from headrace.workers.job import NewPlan, RankContext, TrainJob
from headrace.workers.model.config import AdapterConfig, AdapterKind
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.telemetry import names
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.engine import TrainEngine

Curve = list[tuple[int, float, float]]
NUM_STEPS, NUM_EARLY, REL = 5, 2, 1e-5
SHAPE = {"model": {"init_std": 0.1}, "optim": {"lr": 1e-3, "warmup_steps": 2}}
DROPPED = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.2, targets="q_proj,o_proj,down_proj")


@dataclass(frozen=True)
class Scenario:
    """One run of two ranks; with `own_mind` rank 1 reads the micro-batches of the step behind.

    Args:
        change / told_after: the plans to change to, and after how many steps each rank is told.
    """

    job: TrainJob
    stop_after: int | None = None
    own_mind: bool = False
    change: NewPlan | None = None
    told_after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Played:
    """What one rank said, and the rows of tokens that it read: of every step, of every micro-batch."""

    run: RecordedRun
    read: list[list[list[list[int]]]]

    @property
    def curve(self) -> Curve:
        """Step, loss, gradient norm."""
        return [row[:3] for row in self.run.curve]

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens of a row: of every step, of every micro-batch."""
        return [[len(rows[0]) for rows in step] for step in self.read]


def record(job: TrainJob, context: RankContext | None = None, **options: Any) -> Played:
    train_step, read = TrainEngine.train_step, []

    def recorded(self: TrainEngine, step: int, batches: list[TokenBatch], *rest: Any) -> Any:
        read.append([batch.tokens.tolist() for batch in batches])
        return train_step(self, step, batches, *rest)

    with patch.object(TrainEngine, "train_step", recorded):
        return Played(run_recorded(job, context, **options), read)


def told(num_done: int, *, change: NewPlan | None, after: int) -> NewPlan | None:
    return change if num_done >= after else None


def play(context: RankContext, scenarios: Mapping[str, Scenario], ports: Mapping[str, int]) -> dict[str, Played]:
    """Run scenarios one after the other as one rank."""
    warnings.simplefilter("ignore")
    gc.freeze()  # leaving a group collects garbage, not the modules of torch
    read, played = BucketReader.read, {}
    for name, scenario in scenarios.items():
        os.environ["XDG_CACHE_HOME"] = f"{scenario.job.run_dir}/cache"  # a drive that nobody has written
        behind = int(scenario.own_mind and context.rank == 1)
        with patch.object(BucketReader, "read", lambda self, step, behind=behind: read(self, step + behind)):
            own = replace(context, master_port=ports[name])
            after = scenario.told_after[context.rank] if scenario.change else 0
            newest = partial(told, change=scenario.change, after=after)
            played[name] = record(scenario.job, own, stop_after=scenario.stop_after, newest_plan=newest)
    return played


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lengths")


def job_of(folder: Path, run: str, *, batch_size: int = 1, **options: Any) -> TrainJob:
    """On two ranks with batch_size 1, and on one with 2, a micro-batch has the same rows: FAR divides 32."""
    train = {"steps": NUM_STEPS, "batch_size": batch_size}
    return tiny_bucket_job(folder, run=run, train=train, **{**SHAPE, **options})


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> tuple[TrainJob, Played]:
    job = job_of(folder, "one", batch_size=2, checkpoint={"every": NUM_EARLY, "keep": 9})
    return job, record(job)


@pytest.fixture(scope="module")
def played(folder: Path, one_rank: tuple[TrainJob, Played]) -> dict[str, list[Played]]:
    """Every scenario's two ranks."""
    stopped, handed = job_of(folder, "stopped"), job_of(folder, "handed")
    folders = [CheckpointFolder(Path(job.run_dir) / "checkpoints") for job in (one_rank[0], handed)]
    shutil.copytree(*(checkpoints.path_of(NUM_EARLY) for checkpoints in folders))
    model = one_rank[0].model
    to_drive = NewPlan(1, {length: plan_of_length("offload_ssd", model, length) for length in one_rank[0].lengths})
    scenarios = {
        "whole": Scenario(job_of(folder, "whole")),
        "replicated": Scenario(job_of(folder, "replicated", parallel=ParallelConfig(data=2, fsdp=1))),
        "host": Scenario(job_of(folder, "host", memory="offload_host"), stop_after=NUM_EARLY),
        "stopped": Scenario(stopped, stop_after=NUM_EARLY),
        "resumed": Scenario(stopped),
        "handed": Scenario(handed),
        "adapters": Scenario(job_of(folder, "adapters", adapter=DROPPED), stop_after=NUM_EARLY),
        "changed": Scenario(job_of(folder, "changed", memory="offload_host"), change=to_drive, told_after=(1, 3)),
        "own_mind": Scenario(job_of(folder, "own_mind"), stop_after=NUM_EARLY, own_mind=True),
    }
    ports = {name: free_port() for name in scenarios}
    with tiny_leases(folder, num_ranks=2) as leases:
        both = run_distributed(partial(play, scenarios=scenarios, ports=ports), 2, leases=leases)
    return {name: [runs[name] for runs in both] for name in scenarios}


def is_close(curve: Curve, expected: Curve) -> bool:
    assert [step for step, _, _ in curve] == [step for step, _, _ in expected]
    return all(mine == pytest.approx(other, rel=REL) for mine, other in zip(curve, expected, strict=True))


def test_both_ranks_take_the_same_length_and_together_the_rows_of_one(played, one_rank) -> None:
    mine, other = played["whole"]
    assert mine.lengths == other.lengths
    assert {length for step in mine.lengths for length in step} == set(FAR)
    together = [[a + b for a, b in zip(*steps, strict=True)] for steps in zip(mine.read, other.read, strict=True)]
    assert together == one_rank[1].read
    assert all(len(rows) == 32 // len(rows[0]) for step in mine.read for rows in step)


@pytest.mark.parametrize("name", ["whole", "replicated"])
def test_two_ranks_equal_one_with_twice_the_rows(name: str, played, one_rank) -> None:
    mine, other = played[name]
    assert mine.curve == other.curve  # loss and norm are the group's, to the bit
    assert len(mine.curve) == NUM_STEPS
    assert is_close(mine.curve, one_rank[1].curve)
    for ours, theirs in zip(mine.run.reports, one_rank[1].run.reports, strict=True):
        assert ours.metrics[names.TOKENS_SEEN] == theirs.metrics[names.TOKENS_SEEN]


def test_masks_of_adapters_are_those_of_one_rank(folder: Path, played) -> None:
    mine, other = played["adapters"]
    one = record(job_of(folder, "adapters1", batch_size=2, adapter=DROPPED), stop_after=NUM_EARLY)
    assert mine.curve == other.curve
    assert is_close(mine.curve, one.curve)


def test_offload_on_two_ranks_is_bit_equal(played) -> None:
    for offloaded, kept in zip(played["host"], played["whole"], strict=True):
        assert offloaded.run.curve == kept.run.curve[:NUM_EARLY]


def test_a_resume_in_the_middle_gives_equal_bits(played) -> None:
    for first, second, whole in zip(*(played[name] for name in ("stopped", "resumed", "whole")), strict=True):
        assert first.run.curve + second.run.curve == whole.run.curve
        assert first.read + second.read == whole.read
        assert "data_changed" not in second.run.events


def test_two_ranks_read_on_where_one_stopped(played, one_rank) -> None:
    """The micro-batches have the same rows, so nothing is said of other ones."""
    mine, other = played["handed"]
    assert is_close(mine.curve, one_rank[1].curve[NUM_EARLY:])
    assert [a + b for a, b in zip(mine.read[0], other.read[0], strict=True)] == one_rank[1].read[NUM_EARLY]
    (line,) = mine.run.events["data_changed"].splitlines()
    assert "1 rank(s) wrote it" in line  # rank 1 has no generator state


def test_ranks_change_their_plan_before_the_same_step(played) -> None:
    """Rank 0 is told two steps before rank 1."""
    for changed, kept in zip(played["changed"], played["whole"], strict=True):
        assert changed.run.curve == kept.run.curve
        steps = [report.metrics for report in changed.run.reports]
        assert [step[names.SSD_STORED_GIB] > 0 for step in steps] == [False, False, False, True, True]
        assert [step.get(names.REPLANS) for step in steps] == [None, None, None, 1.0, 1.0]


def test_mutant_ranks_that_take_different_lengths_are_seen(played, one_rank) -> None:
    mine, other = played["own_mind"]
    assert mine.lengths != other.lengths
    assert not is_close(mine.curve, one_rank[1].curve[:NUM_EARLY])
