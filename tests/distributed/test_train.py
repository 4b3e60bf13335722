"""Two ranks over gloo: the same losses as one, one mind about stopping, and checkpoints that either can read.

Starting a process costs seconds, so most scenarios run one after the other in the same two.
"""

from __future__ import annotations

import ast
import gc
import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from headrace.helpers.training import (
    RecordedRun,
    input_bytes_moved,
    moved_bytes,
    run_distributed,
    run_recorded,
    tiny_job,
    tiny_leases,
)
from headrace.storage.core.ports import free_port
from headrace.storage.core.records import Direction, Medium
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.model.config import AdapterConfig, AdapterKind
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankOutcome, StepReport
from headrace.workers.train import checkpoint
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.config import NonFinite
from headrace.workers.train.engine import StepTotals, TrainEngine
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.non_finite import NonFiniteSteps
from headrace.workers.train.session import run_rank

Curve = list[tuple[int, float, float]]
NUM_STEPS, NUM_EARLY, NUM_KILLED, REL = 7, 3, 5, 1e-5
NUM_HUNTED = 20
# Tame enough that a sum in another order stays a matter of rounding for 20 steps.
SHAPE = {"model": {"init_std": 0.1}, "optim": {"lr": 1e-3, "warmup_steps": 2}}

DROPPED = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=8.0, dropout=0.2, targets="q_proj,o_proj,down_proj")


class Fault(Enum):
    """What is broken on purpose while a scenario runs."""

    none = "none"
    no_sync = "gradients never leave the rank"
    local_count = "every rank divides by its own number of targets"
    nan = "rank 1 computes a loss that is not a number in the second step"
    nan_own_mind = "and rank 0 decides by its own loss"
    full_disk = "rank 1 cannot write its generators"


@dataclass(frozen=True)
class Scenario:
    """One run of two ranks; only `asking_rank` asks to stop, once `stop_after` steps are done."""

    job: TrainJob
    stop_after: int | None = None
    asking_rank: int = 0
    fault: Fault = Fault.none


@contextmanager
def broken(fault: Fault, rank: int) -> Iterator[None]:
    """The fault, for as long as the block runs."""
    set_sync, agree = FSDPModule.set_requires_gradient_sync, TrainEngine.agree

    def never(self: FSDPModule, sync: bool, **options: Any) -> None:
        set_sync(self, False, **options)

    def local(self: TrainEngine, batches: Any, **asks: bool) -> StepTotals:
        mine = sum(batch.num_targets for batch in batches)
        return replace(agree(self, batches, **asks), num_targets=2 * mine)

    def no_room(device: torch.device) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    if fault in (Fault.nan, Fault.nan_own_mind):
        with not_a_number(rank, alone=fault is Fault.nan_own_mind):
            yield
    elif fault is Fault.no_sync:
        with patch.object(FSDPModule, "set_requires_gradient_sync", never):
            yield
    elif fault is Fault.local_count:
        with patch.object(TrainEngine, "agree", local):
            yield
    elif fault is Fault.full_disk and rank == 1:
        with patch.object(checkpoint, "rng_state", no_room):
            yield
    else:
        yield


@contextmanager
def not_a_number(rank: int, *, alone: bool) -> Iterator[None]:
    """Rank 1's losses of the second step are NaN; with `alone` rank 0 does not hear of it."""
    forward, train_step, sums, now = (
        ByLayer._forward,
        TrainEngine.train_step,
        TrainEngine._global_loss_and_norm,
        [0],
    )

    def step(self: TrainEngine, number: int, *args: Any) -> Any:
        now[0] = number
        return train_step(self, number, *args)

    def bad(self: ByLayer, batch: Any) -> torch.Tensor:
        return forward(self, batch) * (float("nan") if rank == 1 and now[0] == 1 else 1.0)

    def own(self: TrainEngine, losses: Any, num_targets: int) -> Any:
        found = sums(self, losses, num_targets)
        return (1.0, 1.0) if alone and rank == 0 and now[0] == 1 else found

    with (
        patch.object(ByLayer, "_forward", bad),
        patch.object(TrainEngine, "train_step", step),
        patch.object(TrainEngine, "_global_loss_and_norm", own),
        # The mutant would not meet the other rank here.
        patch.object(NonFiniteSteps, "_write", lambda self, step, result: Path("rows")) if alone else nullcontext(),
    ):
        yield


def play(context: RankContext, scenarios: Mapping[str, Scenario], ports: Mapping[str, int]) -> dict[str, RecordedRun]:
    """Run scenarios one after the other as one rank."""
    warnings.simplefilter("ignore")
    gc.freeze()  # leaving a group collects garbage, not the modules of torch
    runs = {}
    for name, scenario in scenarios.items():
        os.environ["XDG_CACHE_HOME"] = f"{scenario.job.run_dir}/cache"  # a drive that nobody has written
        stop_after = scenario.stop_after if context.rank == scenario.asking_rank else None
        with broken(scenario.fault, context.rank):
            own = replace(context, master_port=ports[name])
            runs[name] = run_recorded(scenario.job, own, stop_after=stop_after)
    return runs


def play_on_two(scenarios: Mapping[str, Scenario], leases: Any = None) -> dict[str, list[RecordedRun]]:
    """Every scenario's two ranks."""
    ports = {name: free_port() for name in scenarios}
    both = run_distributed(partial(play, scenarios=scenarios, ports=ports), 2, leases=leases)
    return {name: [runs[name] for runs in both] for name in scenarios}


def killed_after(context: RankContext, job: TrainJob, num_steps: int, folder: Path) -> None:
    """Rank 1 is killed, as by the kernel, once `num_steps` steps are done; every rank writes down what it saw."""
    with open(folder / f"rank{context.rank}.txt", "w", buffering=1) as file:

        def on_step(report: StepReport) -> None:
            row = (report.step, report.metrics[names.LOSS_TRAIN], report.metrics[names.GRAD_NORM])
            file.write(f"{row!r}\n")
            if context.rank == 1 and report.step == num_steps:
                os.kill(os.getpid(), signal.SIGKILL)

        run_rank(job, context, on_step=on_step, should_stop=lambda: False)


def killed_at(context: RankContext, job: TrainJob, newer_than: int, delay_s: float) -> None:
    """Rank 1 is killed `delay_s` after the second checkpoint beyond `newer_than` is there, wherever it is then."""

    def hunt() -> None:
        while max(checkpoints(job).committed_steps(), default=0) < newer_than + 2:
            time.sleep(0.005)
        time.sleep(delay_s * 0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    if context.rank == 1:
        threading.Thread(target=hunt, daemon=True).start()
    run_rank(job, context, on_step=lambda report: None, should_stop=lambda: False)


def curve_of(run: RecordedRun) -> Curve:
    return [row[:3] for row in run.curve]


def is_close(curve: Curve, expected: Curve) -> bool:
    assert [step for step, _, _ in curve] == [step for step, _, _ in expected]
    return all(mine == pytest.approx(other, rel=REL) for mine, other in zip(curve, expected, strict=True))


def checkpoints(job: TrainJob) -> CheckpointFolder:
    return CheckpointFolder(Path(job.run_dir) / "checkpoints")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> tuple[TrainJob, Curve]:
    """Uninterrupted, with as many micro-batches as two ranks have together; checkpoints on the way."""
    train = {"steps": NUM_STEPS, "micro_batches": 4}
    job = tiny_job(folder, run="one", train=train, checkpoint={"every": NUM_EARLY, "keep": 99}, **SHAPE)
    return job, curve_of(run_recorded(job))


def two_rank_job(folder: Path, run: str, *, steps: int = NUM_STEPS, **overrides: Any) -> TrainJob:
    # The schedule is that of NUM_STEPS: shorter runs are stopped.
    return tiny_job(folder, run=run, train={"steps": steps, "micro_batches": 2}, **{**SHAPE, **overrides})


@pytest.fixture(scope="module")
def played(folder: Path, one_rank: tuple[TrainJob, Curve]) -> tuple[dict[str, Scenario], dict[str, list[RecordedRun]]]:
    """All scenarios that need no help from outside, in two processes."""

    def job(name: str, **overrides: Any) -> TrainJob:
        return two_rank_job(folder, name, **overrides)

    skip = {"steps": NUM_STEPS, "micro_batches": 2, "non_finite": NonFinite.skip}
    skipped, alone_skips = (tiny_job(folder, run=run, train=skip, **SHAPE) for run in ("skipped", "alone_skips"))
    stopped, full = job("stopped"), job("full", steps=2, checkpoint={"every": 1})
    handed, damaged = job("handed", checkpoint={"keep": 9}), job("damaged", checkpoint={"every": 2, "keep": 3})
    shutil.copytree(checkpoints(one_rank[0]).path_of(NUM_EARLY), checkpoints(handed).path_of(NUM_EARLY))
    scenarios = {
        "whole": Scenario(job("whole", parallel=ParallelConfig(data=2, fsdp=2))),
        "replicated": Scenario(job("replicated", parallel=ParallelConfig(data=2, fsdp=1))),
        "host": Scenario(job("host", memory="offload_host"), stop_after=NUM_EARLY),
        "ssd": Scenario(job("ssd", memory="offload_ssd"), stop_after=NUM_EARLY),
        "stopped": Scenario(stopped, stop_after=2, asking_rank=1),
        "resumed": Scenario(stopped, stop_after=NUM_EARLY + 2),
        "no_sync": Scenario(job("no_sync"), stop_after=NUM_EARLY, fault=Fault.no_sync),
        "local_count": Scenario(job("local_count"), stop_after=NUM_EARLY, fault=Fault.local_count),
        "skipped": Scenario(skipped, stop_after=NUM_EARLY, fault=Fault.nan),
        "skipped_on": Scenario(skipped, stop_after=NUM_EARLY + 2),
        "alone_skips": Scenario(alone_skips, stop_after=NUM_EARLY, fault=Fault.nan_own_mind),
        "handed": Scenario(handed, stop_after=NUM_EARLY + 1),
        "first": Scenario(job("first", steps=0, checkpoint={"at_end": True})),
        "full": Scenario(full, fault=Fault.full_disk),
        "room_again": Scenario(full),
        "before_damage": Scenario(damaged, stop_after=4),
        "adapters": Scenario(job("adapters", adapter=DROPPED), stop_after=2),
    }
    with tiny_leases(folder, num_ranks=2) as leases:
        return scenarios, play_on_two(scenarios, leases)


@pytest.mark.parametrize("name", ["whole", "replicated"])
def test_two_ranks_equal_one_with_twice_the_micro_batches(name: str, played, one_rank) -> None:
    mine, other = played[1][name]
    assert curve_of(mine) == curve_of(other)  # loss and norm are the group's, to the bit
    assert len(mine.curve) == NUM_STEPS
    assert is_close(curve_of(mine), one_rank[1])
    assert mine.result.stats["world_size"] == 2


def test_masks_of_adapters_are_those_of_one_rank(folder: Path, played) -> None:
    """The rows of a step are the same ones; only the order of sums differs."""
    mine, other = played[1]["adapters"]
    one = tiny_job(folder, run="adapters1", train={"steps": NUM_STEPS, "micro_batches": 4}, adapter=DROPPED, **SHAPE)
    assert curve_of(mine) == curve_of(other)
    assert is_close(curve_of(mine), curve_of(run_recorded(one, stop_after=2)))


@pytest.mark.parametrize("name", ["no_sync", "local_count"])
def test_mutants_of_the_sum_over_ranks_are_seen(name: str, played, one_rank) -> None:
    mine, _ = played[1][name]
    assert not is_close(curve_of(mine), one_rank[1][:NUM_EARLY])


@pytest.mark.parametrize("name", ["host", "ssd"])
def test_offload_on_two_ranks_is_bit_equal_and_moves_the_planned_bytes(name: str, played) -> None:
    scenarios, runs = played
    job = scenarios[name].job
    assert curve_of(runs[name][0]) == curve_of(runs["whole"][0])[:NUM_EARLY]
    sizes = {"input_bytes": 2 * 32 * job.model.hidden_size * 4, "micro_batches": 2, "with_norm": True}
    for rank, direction in itertools.product(range(2), Direction):
        moved, planned = moved_bytes(job.run_dir, rank), input_bytes_moved(job.plan, direction=direction, **sizes)
        for medium in (Medium.host, Medium.ssd):
            assert moved.get((medium.value, direction.value), 0) == NUM_EARLY * planned[medium]


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_both_and_listed(played) -> None:
    """Rank 0 cannot see it: the reduction decides. The step changes nothing: the next losses are those without it."""
    scenarios, runs = played
    for name in ("skipped", "skipped_on"):
        assert curve_of(runs[name][0]) == curve_of(runs[name][1])
    for run in runs["skipped"]:
        assert [names.LOSS_TRAIN in report.metrics for report in run.reports] == [True, False, True]
        assert run.reports[-1].metrics[names.SKIPPED_STEPS] == 1.0
    assert [r.metrics[names.SKIPPED_STEPS] for r in runs["skipped_on"][0].reports] == [1.0, 1.0]
    record = json.loads((Path(scenarios["skipped"].job.run_dir) / "non_finite" / "step_000002.json").read_text())
    bad = {(each["micro_batch"], each["rank"]) for each in record["micro_batches"] if not each["loss_is_finite"]}
    assert bad == {(0, 1), (1, 1)}


def test_mutant_a_rank_that_decides_alone_is_seen(played) -> None:
    _, runs = played
    updated, left = runs["alone_skips"]
    assert names.LOSS_TRAIN in updated.reports[1].metrics
    assert names.LOSS_TRAIN not in left.reports[1].metrics
    assert curve_of(updated)[2] != curve_of(runs["skipped"][0])[2]


def test_one_rank_asks_and_all_stop_after_the_same_step_then_go_on(played) -> None:
    _, runs = played
    for rank in range(2):
        first, second, whole = (runs[name][rank] for name in ("stopped", "resumed", "whole"))
        assert (first.result.outcome, first.result.last_step) == (RankOutcome.stopped, 2)
        assert first.curve + second.curve == whole.curve[: NUM_EARLY + 2]


def test_a_checkpoint_of_one_rank_is_read_by_two_and_back(played, one_rank) -> None:
    """1 -> 2 -> 1 ranks: equal weights at every hand-over, the losses of the uninterrupted run, the same rows."""
    scenarios, runs = played
    source, expected = one_rank
    job = scenarios["handed"].job
    run, _ = runs["handed"]
    assert is_close(curve_of(run), expected[NUM_EARLY : NUM_EARLY + 1])
    assert "1 rank(s) wrote it" in run.events["data_changed"]  # rank 1 has no generator state
    assert checkpoints(job).committed_steps() == [NUM_EARLY + 1, NUM_EARLY]
    back = run_recorded(replace(source, run_dir=job.run_dir), stop_after=NUM_EARLY + 3)
    assert is_close(curve_of(back), expected[NUM_EARLY + 1 : NUM_EARLY + 3])


def test_weights_do_not_depend_on_who_wrote_them(folder: Path, played) -> None:
    two = dict(read_model_state(played[0]["first"].job.run_dir).tensors)
    alone = two_rank_job(folder, "first1", steps=0, checkpoint={"at_end": True})
    run_recorded(alone)
    one = dict(read_model_state(alone.run_dir).tensors)
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_rank_that_cannot_write_fails_the_save_of_all_and_not_the_run(played) -> None:
    scenarios, runs = played
    assert [run.result.last_step for run in runs["full"]] == [2, 2]
    said = runs["full"][0].events["checkpoint_failed"]
    assert "rank 1 could not write" in said
    assert "rng_00001.json" in said
    assert "The disk is full" in said
    assert runs["room_again"][0].reports[0].step == 1  # nothing was left to resume from
    assert [run.result.outcome for run in runs["room_again"]] == [RankOutcome.finished] * 2
    assert checkpoints(scenarios["full"].job).committed_steps() == [2, 1]


@pytest.fixture(scope="module")
def played_on(folder: Path, played) -> dict[str, list[RecordedRun]]:
    """What runs say after a shard was cut, and after a rank was killed in the fifth step."""
    damaged = played[0]["before_damage"].job
    shard = checkpoints(damaged).path_of(4) / "state" / "rank_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    killed = two_rank_job(folder, "killed", checkpoint={"every": 2, "keep": 2})
    with pytest.raises(RuntimeError, match=r"rank \d (ended|failed)"):
        run_distributed(partial(killed_after, job=killed, num_steps=NUM_KILLED, folder=folder), 2)
    assert checkpoints(killed).committed_steps() == [4, 2]
    return play_on_two({"damaged": Scenario(damaged, stop_after=4), "killed": Scenario(killed)})


def test_a_damaged_shard_is_found_by_whoever_reads_it(played, played_on) -> None:
    for rank in range(2):
        assert played_on["damaged"][rank].curve == played[1]["before_damage"][rank].curve[2:4]
    assert "rank_00001.safetensors" in played_on["damaged"][0].events["checkpoint_damaged"]


def test_a_killed_rank_ends_the_group_and_the_next_one_goes_on_to_the_bit(folder: Path, played, played_on) -> None:
    """Saved after the fourth step, SIGKILL in the fifth, against an uninterrupted run; the lost step is run again."""
    whole = curve_of(played[1]["whole"][0])
    seen = [ast.literal_eval(line) for line in (folder / "rank1.txt").read_text().splitlines()]
    assert seen == whole[:NUM_KILLED]
    for run in played_on["killed"]:
        assert curve_of(run) == whole[4:]
        assert run.result.outcome is RankOutcome.finished


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ranks_killed_at_any_moment_go_on_to_the_bit(folder: Path) -> None:
    """One run, killed by the clock again and again, also inside of a save; every attempt adds to the same curve."""
    uninterrupted = Scenario(two_rank_job(folder, "unhunted", steps=NUM_HUNTED))
    whole = curve_of(play_on_two({"unhunted": uninterrupted})["unhunted"][0])
    job = two_rank_job(folder, "hunted", steps=NUM_HUNTED, checkpoint={"every": 1, "keep": 2})
    draw = random.Random(5)
    for attempt in range(6):
        before = checkpoints(job).committed_steps()
        with pytest.raises((RuntimeError, TimeoutError)):
            run_distributed(partial(killed_at, job=job, newer_than=max(before, default=0), delay_s=draw.random()), 2)
        after = checkpoints(job).committed_steps()
        assert max(after) > max(before, default=0), attempt
        if max(after) > NUM_HUNTED - 4:
            break
    resumed_at = max(checkpoints(job).committed_steps())
    for run in play_on_two({"hunted": Scenario(job)})["hunted"]:
        assert curve_of(run) == whole[resumed_at:]
