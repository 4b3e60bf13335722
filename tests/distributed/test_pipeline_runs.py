"""Runs whose ranks have stages of a pipeline: they change their degrees, and count what they move."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from headrace.helpers.training import run_distributed, run_recorded, tiny_job, tiny_leases
from headrace.storage.core.ports import free_port
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.plan import Residence
from headrace.workers.parallel.config import ZBV, Vocabulary
from headrace.workers.telemetry import names
from headrace.workers.train.config import Precision
from headrace.workers.train.model_state import read_model_state

NUM_RUN_STEPS = 6
SHAPE: dict[str, Any] = {
    "model": {"init_std": 0.1, "num_layers": 4, "tie_embeddings": True},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": NUM_RUN_STEPS, "micro_batches": 3, "eval_every": 2, "eval_batches": 2, "grad_clip": 0.5},
    "checkpoint": {"at_end": True},
}


def runs(context: RankContext, jobs: tuple[TrainJob, ...], ports: tuple[int, ...]) -> list[list[dict[str, float]]]:
    """Metrics of the steps of jobs, one after the other; all but the last stop early."""
    found = []
    for number, (job, port) in enumerate(zip(jobs, ports, strict=True)):
        stop_after = 2 * number + 2 if number < len(jobs) - 1 else None
        recorded = run_recorded(job, replace(context, master_port=port), stop_after=stop_after)
        found.append([report.metrics for report in recorded.reports])
    return found


def test_a_run_changes_its_degrees_and_counts_what_it_moves(tmp_path: Path) -> None:
    """Two steps with stages whose inputs wait on the host, two with sharded weights, two of zbv with shared rows."""
    alone = tiny_job(tmp_path, run="one", **SHAPE)
    one = [report.metrics for report in run_recorded(alone).reports]
    first = tiny_job(tmp_path, run="shared", memory="offload_host", parallel={"pipeline": 2}, **SHAPE)
    halves = SHAPE | {"train": SHAPE["train"] | {"batch_size": 1}}
    jobs = (
        first,
        tiny_job(tmp_path, run="shared", **halves),
        tiny_job(
            tmp_path,
            run="shared",
            parallel={"pipeline": 2, "pipeline_schedule": ZBV, "vocabulary": Vocabulary.vocab_2},
            **SHAPE,
        ),
    )
    ports = tuple(free_port() for _ in jobs)
    with tiny_leases(tmp_path, num_ranks=2) as leases:
        of_ranks = run_distributed(partial(runs, jobs=jobs, ports=ports), 2, leases=leases)
    check_run(jobs[-1], of_ranks[0], alone, one)
    model, train = first.model, first.train
    edge = train.micro_batches * train.batch_size * first.data.seq_len * model.hidden_size * 4
    for rank, others in enumerate(of_ranks):
        assert [step[names.PIPELINE_SENT_GIB] * 2**30 for step in others[0]] == [edge] * 2
        assert [step[names.PIPELINE_SENT_GIB] * 2**30 for step in others[2]] == [
            (5 - 2 * rank) * edge + edge * (3 + model.hidden_size) // model.hidden_size
        ] * 2
        on_host = sum(layer.residence("x", 0) is Residence.host for layer in first.plan.layers[2 * rank : 2 * rank + 2])
        assert on_host >= 1
        assert [step[names.HOST_STORED_GIB] * 2**30 for step in others[0]] == [on_host * edge] * 2


def check_run(
    last: TrainJob, found: list[list[dict[str, float]]], alone: TrainJob, one: list[dict[str, float]]
) -> None:
    """Steps of jobs that continue each other, two of each, are those of a single rank, and so are the weights."""
    assert [len(metrics) for metrics in found] == [2, 2, 2]
    for name in (names.LOSS_TRAIN, names.GRAD_NORM, names.LOSS_EVAL, names.TOKENS_SEEN):
        values, expected = ([m[name] for m in steps if name in m] for steps in ((m for ms in found for m in ms), one))
        assert values == pytest.approx(expected, rel=1e-5), name
    exported, plain = (dict(read_model_state(job.run_dir).tensors) for job in (last, alone))
    assert exported.keys() == plain.keys()
    for name, weight in plain.items():
        assert float((exported[name] - weight).norm() / weight.norm()) < 1e-5, name


@pytest.mark.soak
def test_soak_bf16_with_sharded_weights(tmp_path: Path) -> None:
    """Gradients of one dtype reach FSDP2: zbv with shared rows follows 1f1b, step by step."""
    degrees = {"pipeline": 2, "data": 2}
    split = degrees | {"pipeline_schedule": ZBV, "vocabulary": Vocabulary.vocab_2}
    shape = SHAPE | {"train": SHAPE["train"] | {"precision": Precision.bf16, "batch_size": 1}}
    jobs = tuple(
        tiny_job(tmp_path, run=name, parallel=parallel, **shape) for name, parallel in (("1", degrees), ("2", split))
    )
    ports = tuple(free_port() for _ in jobs)
    found = run_distributed(partial(bf16_losses, jobs=jobs, ports=ports), 4)[0]
    assert len(found[0]) == NUM_RUN_STEPS
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def bf16_losses(context: RankContext, jobs: tuple[TrainJob, ...], ports: tuple[int, ...]) -> list[list[float]]:
    return [
        [step.metrics[names.LOSS_TRAIN] for step in run_recorded(job, replace(context, master_port=port)).reports]
        for job, port in zip(jobs, ports, strict=True)
    ]


@pytest.mark.soak
def test_soak_a_run_changes_to_tensor_ranks_in_stages_and_back(tmp_path: Path) -> None:
    """Gradient norm, clipping, agreement, evaluation, checkpoints in both directions, export."""
    alone = tiny_job(tmp_path, run="one", **SHAPE)
    one = [report.metrics for report in run_recorded(alone).reports]
    halves = SHAPE | {"train": SHAPE["train"] | {"batch_size": 1}}
    jobs = (
        tiny_job(tmp_path, run="shared", parallel={"tensor": 2, "data": 2}, **halves),
        tiny_job(tmp_path, run="shared", parallel={"tensor": 2, "pipeline": 2}, memory="recompute", **SHAPE),
        tiny_job(tmp_path, run="shared", parallel={"pipeline": 2, "data": 2}, **halves),
    )
    ports = tuple(free_port() for _ in jobs)
    of_ranks = run_distributed(partial(runs, jobs=jobs, ports=ports), 4)
    check_run(jobs[-1], of_ranks[0], alone, one)
    for others in of_ranks:
        assert [names.TENSOR_SENT_GIB in metrics[0] for metrics in others] == [True, True, False]
        assert [names.PIPELINE_SENT_GIB in metrics[0] for metrics in others] == [False, True, True]
