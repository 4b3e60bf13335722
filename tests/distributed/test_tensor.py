"""Ranks that share the weights: losses, gradients and weights of two steps are those of one plain process."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from headrace.helpers.sharing import (
    LOSS_TILE,
    SEQ_LEN,
    Case,
    case,
    check,
    check_errors,
    decoder,
    errors,
    plain_steps,
    plan_of,
    run,
    steps_of,
)
from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed, run_recorded, tiny_job
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.ports import free_port
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.parallel import tensor
from headrace.workers.parallel.collectives import TENSOR
from headrace.workers.parallel.context import SplitPacking
from headrace.workers.telemetry import names
from headrace.workers.train import engine
from headrace.workers.train.model_state import read_model_state

TWO = {"tensor": 2}
PROFILE = HardwareProfile(name="test", device_class=DeviceClass.cpu)


def steps(context: RankContext, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    return steps_of(context, cases, MUTANTS)


# Heads with norms and tied weights, biases, adapters, a window, a KV head on two ranks, uneven shards of a vocabulary.
FAMILIES = (
    case("qwen3", TWO, plan="recompute"),
    case("qwen2", TWO, tied=True, documents=False, kv_heads=1),
    case("llama", TWO, lora=True, plan="results", kv_heads=1),
    case("mistral", TWO, dtype=torch.float32),
)
PLANS = tuple(case("qwen3", TWO, plan=name, kv_heads=1) for name in ("keep", "recompute", "results", "front"))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What ranks have found, by word: one start of them for all cases."""
    mutants = [replace(PLANS[0], mutant=name) for name in MUTANTS]
    results = iter(run(steps, *FAMILIES, *PLANS, *mutants, num_ranks=2))
    of_families, of_plans = (list(islice(results, len(cases))) for cases in (FAMILIES, PLANS))
    return {"families": of_families, "plans": of_plans, "mutants": list(results)}


def test_two_steps_are_those_of_one_process_and_send_what_is_planned(found: dict[str, Any]) -> None:
    for what, own in zip(FAMILIES, found["families"], strict=True):
        check_errors(what, own)
        assert own["sent"] == [{TENSOR: planned_bytes(what)}] * len(own["sent"]), what


def planned_bytes(what: Case) -> int:
    request = PlanRequest(
        model=decoder(what).config,
        seq_len=SEQ_LEN,
        profile=PROFILE,
        batch_size=2,
        itemsize=what.dtype.itemsize,
        tensor_degree=2,
        loss_tile=LOSS_TILE,
        adapter=what.adapter,
    )
    return sent_bytes(plan_of(what, request.model.num_layers, request.skeleton()), request)[names.TENSOR_SENT_GIB]


@pytest.mark.soak
@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 2, "data": 2},
        {"tensor": 2, "data": 2, "fsdp": 1},
        {"tensor": 2, "ulysses": 2},
        {"tensor": 2, "ring": 2},
    ],
)
def test_soak_all_models(degrees: dict[str, int]) -> None:
    """With other degrees, in both precisions, and with adapters. One start of ranks for all of them."""
    forms: list[dict[str, Any]] = [
        {"plan": "recompute"},
        {"plan": "results", "lora": True},
        {"documents": False, "dtype": torch.float32},
    ]
    kv_heads = 1 if "ulysses" in degrees else 8 // degrees["tensor"]
    cases = [case(model, degrees, kv_heads=kv_heads, **form) for model, form in product(MODELS, forms)]
    num_ranks = degrees["tensor"] * math.prod(degrees.get(name, 1) for name in ("data", "ulysses", "ring"))
    check(steps, *cases, num_ranks=num_ranks)


summed = tensor.reduce_scatter


def own_part_unsummed(parts: torch.Tensor, group: Any, traffic: Any) -> torch.Tensor:
    return parts[group.rank()].clone()


MUTANTS: dict[str, Any] = {
    "gradients of norms are not summed": [(tensor, "all_reduce_", lambda grads, group, traffic: grads)],
    "gradients of a KV head are not summed over its copies": [
        (tensor, "reduce_scatter", lambda parts, *at: (own_part_unsummed if parts.dim() == 2 else summed)(parts, *at))
    ],
    "the parts of a row product are not summed": [(tensor, "reduce_scatter", own_part_unsummed)],
    "the head's whole gradient is summed again": [(tensor.TensorGroup, "part", tensor.TensorGroup.scatter)],
    "every shard of the vocabulary begins at row 0": [
        (tensor.TensorVocabulary, "_first", property(lambda self: 0, lambda self, first: None))
    ],
    "positions do not know the tensor ranks": [
        (
            SplitPacking,
            "positions",
            lambda self, b, t, d, s=None: torch.arange(t).repeat(b, 2)[:, : self.places.shape[1]],
        )
    ],
}


def test_plans_are_equal_to_the_bit(found: dict[str, Any]) -> None:
    keep, *others = found["plans"]
    check_errors(PLANS[0], keep)
    for other in others:
        assert other["losses"] == keep["losses"]
        assert all(torch.equal(param, keep["params"][name]) for name, param in other["params"].items())


def test_every_mutant_fails(found: dict[str, Any]) -> None:
    expected = plain_steps(PLANS[0])
    for own, name in zip(found["mutants"], MUTANTS, strict=True):
        assert errors(own, expected)[1] > 1e-6, name


NUM_STEPS = 6
SHAPE: dict[str, Any] = {
    "model": {"init_std": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": NUM_STEPS, "eval_every": 2, "eval_batches": 2, "grad_clip": 0.5},
    "checkpoint": {"at_end": True},
}


def planned_job(folder: Path, preset: MemoryPreset, **degrees: int) -> TrainJob:
    """A job of two ranks with the plan that the planner makes for it. A step has four rows at any degree."""
    shape = SHAPE if degrees else SHAPE | {"train": SHAPE["train"] | {"batch_size": 1}}
    job = tiny_job(folder, run="shared", parallel=degrees, **shape)
    request = PlanRequest(
        model=job.model,
        seq_len=job.data.seq_len,
        profile=PROFILE,
        preset=preset,
        batch_size=job.train.batch_size,
        micro_batches=job.train.micro_batches,
        tensor_degree=job.parallel.tensor,
        num_shards=2 // job.parallel.tensor,
        loss_tile=job.train.loss_tile,
        packed=True,
    )
    return replace(job, plan=solve_plan(request))


def runs(context: RankContext, jobs: tuple[TrainJob, ...], ports: tuple[int, ...]) -> list[list[dict[str, float]]]:
    """Metrics of the steps of jobs, one after the other: the first two stop early; the last is a mutant."""
    found = []
    for number, (job, port) in enumerate(zip(jobs, ports, strict=True)):
        is_mutant = number == len(jobs) - 1
        with patch.object(engine, "is_whole", (lambda param: False) if is_mutant else tensor.is_whole):
            stop_after = 2 * number + 2 if number < 2 else None
            recorded = run_recorded(job, replace(context, master_port=port), stop_after=stop_after)
        found.append([report.metrics for report in recorded.reports])
    return found


def test_a_run_changes_its_degrees_and_counts_what_it_sends(tmp_path: Path) -> None:
    """Two steps with shared weights, two with sharded ones from the checkpoint of those, two with shared ones again."""
    plain = tiny_job(tmp_path, run="one", **SHAPE)
    one = [report.metrics for report in run_recorded(plain).reports]
    first, last = (planned_job(tmp_path, preset, tensor=2) for preset in (MemoryPreset.recompute, MemoryPreset.keep))
    between, mutant = planned_job(tmp_path, MemoryPreset.keep), replace(first, run_dir=str(tmp_path / "mutant"))
    jobs, ports = (first, between, last, mutant), tuple(free_port() for _ in range(4))
    *found, wrong = run_distributed(partial(runs, jobs=jobs, ports=ports), 2)[0]
    assert [len(metrics) for metrics in found] == [2, 2, 2]
    for name in (names.LOSS_TRAIN, names.GRAD_NORM, names.LOSS_EVAL, names.TOKENS_SEEN):
        values, expected = ([m[name] for m in steps if name in m] for steps in ((m for ms in found for m in ms), one))
        assert values == pytest.approx(expected, rel=1e-5), name
    assert wrong[0][names.GRAD_NORM] != pytest.approx(one[0][names.GRAD_NORM], rel=1e-3)
    for job, metrics in ((first, found[0]), (last, found[2])):
        assert job.plan.predicted[names.TENSOR_SENT_GIB] > 0
        assert {step[names.TENSOR_SENT_GIB] for step in metrics} == {job.plan.predicted[names.TENSOR_SENT_GIB]}
    assert names.TENSOR_SENT_GIB not in found[1][0]
    exported, alone = (dict(read_model_state(job.run_dir).tensors) for job in (last, plain))
    assert exported.keys() == alone.keys()
    for name, weight in alone.items():
        assert float((exported[name] - weight).norm() / weight.norm()) < 1e-5, name
