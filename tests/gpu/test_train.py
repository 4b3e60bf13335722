"""The training session on CUDA: bf16, one NCCL rank, the allocator as meter. No Ray, Hydra, MLflow or DALI."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.helpers.training import (
    RecordedRun,
    input_bytes_moved,
    moved_bytes,
    run_recorded,
    tiny_data,
    tiny_job,
    tiny_leases,
)
from headrace.storage.config import DeviceTierConfig, TiersConfig
from headrace.storage.core.errors import DeviceBudgetExceeded
from headrace.storage.core.records import Direction, Lease, Medium
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankOutcome
from headrace.workers.train.config import Precision
from headrace.workers.train.model_state import read_model_state

pytestmark = pytest.mark.gpu

PLANS = ("keep", "recompute", "offload_host", "offload_ssd")
SEQ_LEN, HIDDEN, BATCH_SIZE, MICRO_BATCHES, NUM_STEPS = 512, 256, 2, 2, 20
GIB = 1024**3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs; the data is prepared once."""
    return tmp_path_factory.mktemp("cuda")


@pytest.fixture(scope="module")
def leases(folder: Path) -> Iterator[tuple[Lease, ...]]:
    """A host and an SSD lease, 16 MiB each."""
    with tiny_leases(folder, host_bytes=16 << 20, ssd_bytes=16 << 20) as per_rank:
        yield per_rank[0]


@pytest.fixture(scope="module")
def job(folder: Path) -> Callable[..., TrainJob]:
    """Heads of 64, rows of 512 tokens: shapes that the attention operators of CUDA take."""
    data, numbers = tiny_data(folder / "rows", seq_len=SEQ_LEN, num_documents=600), itertools.count()

    def make(**overrides: Any) -> TrainJob:
        train = {
            "steps": NUM_STEPS,
            "batch_size": BATCH_SIZE,
            "micro_batches": MICRO_BATCHES,
            "precision": Precision.bf16,
            "loss_tile": 256,
            **overrides.pop("train", {}),
        }
        model = {"hidden_size": HIDDEN, "intermediate_size": 512, **overrides.pop("model", {})}
        return tiny_job(folder, run=f"run{next(numbers)}", data=data, train=train, model=model, **overrides)

    return make


def run(job: TrainJob, leases: tuple[Lease, ...] = (), *, attempt: int = 0, **options: Any) -> RecordedRun:
    return run_recorded(job, RankContext(device="cuda", leases=leases, attempt=attempt), **options)


@pytest.fixture(scope="module")
def reference(job: Callable[..., TrainJob]) -> tuple[TrainJob, RecordedRun]:
    """20 uninterrupted steps with everything kept."""
    kept = job(checkpoint={"at_end": True})
    return kept, run(kept)


@pytest.mark.parametrize("memory", PLANS)
def test_every_plan_computes_the_same_and_interruption_changes_nothing(memory: str, job, reference, leases) -> None:
    """20 steps, stopped after 10 and continued, against 20 with everything kept; bytes per tier by the formula."""
    kept, expected = reference
    interrupted = job(memory=memory, checkpoint={"at_end": True})
    first = run(interrupted, leases, stop_after=10)
    assert first.result.outcome is RankOutcome.stopped
    second = run(interrupted, leases, attempt=1)
    assert first.curve + second.curve == expected.curve
    ours, theirs = (dict(read_model_state(j.run_dir).tensors) for j in (interrupted, kept))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    sizes = {"input_bytes": BATCH_SIZE * SEQ_LEN * HIDDEN * 2, "micro_batches": MICRO_BATCHES, "with_norm": True}
    for attempt, direction in itertools.product(range(2), Direction):
        moved = moved_bytes(interrupted.run_dir, attempt=attempt)
        planned = input_bytes_moved(interrupted.plan, direction=direction, **sizes)
        for medium in (Medium.host, Medium.ssd):
            assert moved.get((medium.value, direction.value), 0) == 10 * planned[medium]


def test_the_loss_falls(reference) -> None:
    losses = [loss for _, loss, _, _ in reference[1].curve]
    assert losses[-1] < losses[0] - 0.5


def test_the_peak_is_the_allocators_and_offload_lowers_it(job, leases) -> None:
    peaks = {}
    for memory in PLANS:
        seen: list[int] = []
        small = job(memory=memory, train={"steps": 2})
        reports = run(small, leases, also_on_step=lambda r: seen.append(torch.cuda.max_memory_allocated())).reports  # noqa: B023
        assert [round(report.metrics[names.GPU_PEAK_GIB] * GIB) for report in reports] == seen
        peaks[memory] = seen[-1]
    assert peaks["offload_host"] < peaks["recompute"] < peaks["keep"]
    assert peaks["offload_ssd"] < peaks["recompute"]


def test_one_rank_speaks_nccl_on_the_device_and_gloo_on_the_host(job) -> None:
    backends = []

    def look(report: Any) -> None:
        on_device = torch.ones(1, device="cuda")
        dist.all_reduce(on_device)
        backends.append((dist.get_backend(), float(on_device)))
        config = str(dist.get_backend_config()).split(",")
        assert sorted(config) == ["cpu:gloo", "cuda:nccl"]

    run(job(train={"steps": 1}), also_on_step=look)
    assert len(backends) == 1
    assert backends[0][1] == 1.0
    assert not dist.is_initialized()


def test_fp32_on_the_device_is_the_cpus_run(job) -> None:
    fp32 = {"train": {"steps": 5, "precision": Precision.fp32}}
    on_device, on_cpu = run(job(**fp32)).curve, run_recorded(job(**fp32)).curve
    for (_, loss, norm, _), (_, expected_loss, expected_norm, _) in zip(on_device, on_cpu, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)


def test_bf16_is_near_fp32(job) -> None:
    low, high = (run(job(train={"steps": 5, "precision": precision})).curve for precision in Precision)
    for (_, loss, _, _), (_, other, _, _) in zip(low, high, strict=True):
        assert loss != other
        assert loss == pytest.approx(other, rel=1e-2)


def test_evaluation_changes_nothing(job, reference) -> None:
    often = run(job(train={"steps": 4, "eval_every": 1}))
    assert all(names.LOSS_EVAL in report.metrics for report in often.reports)
    first = run(job(train={"steps": 4}))
    assert often.curve == first.curve


def test_a_budget_that_is_too_small_is_named_and_does_not_outlive_the_run(job) -> None:
    wide = job(train={"steps": 1}, model={"hidden_size": 2048, "num_heads": 16, "num_kv_heads": 8})
    tiers = TiersConfig(device=DeviceTierConfig(budget_gib=0.6))
    with pytest.raises(DeviceBudgetExceeded, match=r"tiers\.device\.budget_gib.*memory="):
        run(replace(wide, tiers=tiers))
    assert not dist.is_initialized()
    torch.cuda.empty_cache()
    assert run(job(train={"steps": 1})).result.last_step == 1
    block = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")  # beyond the old budget
    assert block.numel() == 2 * GIB
