"""Ranks that share the tokens of a row: losses, gradients and weights of two steps are those of one plain process."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from headrace.helpers.sharing import BOUNDS, SEQ_LEN, Case, case, check, errors, plain_steps, run, steps_of
from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed, run_recorded, tiny_job
from headrace.kernels.attention.cut import Reading
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.ports import free_port
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.parallel import ring_cut, ulysses
from headrace.workers.parallel.config import RingLayout
from headrace.workers.parallel.context import SplitPacking
from headrace.workers.parallel.dims import Axis
from headrace.workers.telemetry import names
from headrace.workers.train import engine

RING_2_ULYSSES_2 = {"ring": 2, "ulysses": 2}


def steps(context: RankContext, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    return steps_of(context, cases, MUTANTS)


def test_two_steps_are_those_of_one_process() -> None:
    """Heads with norms and tied weights, a window, biases and stripes; one start of ranks for all of them."""
    striped = {"ring": 2, "ring_layout": RingLayout.striped}
    check(
        steps,
        case("qwen3", {"ulysses": 2}),
        case("mistral", {"ring": 2}),
        case("qwen2", striped, dtype=torch.float32),
        num_ranks=2,
    )


GRID = [
    (case(model, degrees, dtype=dtype, documents=documents, kv_heads=kv_heads, plan=plan), ranks)
    for model, (degrees, ranks), dtype, documents, (kv_heads, plan) in itertools.product(
        MODELS,
        [
            ({"ulysses": 2}, 2),
            ({"ulysses": 4}, 4),
            ({"ring": 2}, 2),
            ({"ring": 4}, 4),
            ({"ring": 4, "ring_layout": RingLayout.striped}, 4),
            ({"ring": 4, "ring_layout": RingLayout.contiguous}, 4),
            (RING_2_ULYSSES_2, 4),
            ({"ulysses": 2, "fsdp": 2}, 4),
            ({"ring": 2, "data": 2, "fsdp": 2}, 4),
        ],
        BOUNDS,
        [True, False],
        [(2, "recompute"), (1, "results")],
    )
]


@pytest.mark.soak
@pytest.mark.parametrize(("what", "num_ranks"), GRID)
def test_soak_all_models_and_degrees(what: Case, num_ranks: int) -> None:
    check(steps, what, num_ranks=num_ranks)


MUTANTS = {
    "positions count from 0 on every rank": [(SplitPacking, "positions", lambda self, b, t, d, s=None: local(self, d))],
    "the last hop of the ring is left out": [(SplitPacking, "hops", property(lambda self: 0, lambda self, hops: None))],
    "gradients of replicated heads are not summed": [(ulysses, "added_up", lambda x, n, d: first_copy(x, n, d))],
    "documents see those before them": [
        (ring_cut, "readings_by_row", lambda *args: one_document()),
        (ring_cut.RingCut, "_first_seen", lambda self, query: 0),
    ],
}


def local(packing: SplitPacking, device: torch.device) -> torch.Tensor:
    return torch.arange(packing.places.shape[1], device=device).expand_as(packing.places)


def first_copy(tensor: torch.Tensor, copies: int, head_size: int) -> torch.Tensor:
    return tensor if copies == 1 else tensor.unflatten(2, (-1, copies, head_size))[:, :, :, 0].flatten(2)


def one_document() -> Any:
    return ((Reading((0, SEQ_LEN), (0, SEQ_LEN)),),) * 2


def test_plans_are_equal_to_the_bit_and_every_mutant_fails() -> None:
    """Ring 2 x Ulysses 2 with one KV head, which both Ulysses ranks have. One start of ranks for all of it."""
    plain = case("llama", RING_2_ULYSSES_2, kv_heads=1)
    plans = [replace(plain, plan=name) for name in ("keep", "recompute", "results", "front")]
    mutants = [replace(plain, mutant=name) for name in MUTANTS]
    keep, *others = run(steps, *plans, *mutants, num_ranks=4)
    expected = plain_steps(plain)
    of_loss, of_params = errors(keep, expected)
    assert of_loss < 1e-12
    assert of_params < 1e-11
    for found in others[: len(plans) - 1]:
        assert found["losses"] == keep["losses"]
        assert all(torch.equal(param, keep["params"][name]) for name, param in found["params"].items())
    for found, name in zip(others[len(plans) - 1 :], MUTANTS, strict=True):
        assert errors(found, expected)[1] > 1e-6, name


NUM_RUN_STEPS, NUM_EARLY = 6, 3
SHAPE: dict[str, Any] = {
    "model": {"init_std": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": NUM_RUN_STEPS, "eval_every": 2, "eval_batches": 2},
}


def planned_job(folder: Path, **degrees: int) -> TrainJob:
    """A job of ranks that share their rows, with the plan that the planner makes for it."""
    job = tiny_job(folder, run="shared", parallel=degrees, **SHAPE)
    request = PlanRequest(
        model=job.model,
        seq_len=job.data.seq_len,
        profile=HardwareProfile(name="test", device_class=DeviceClass.cpu),
        preset=MemoryPreset.recompute,
        batch_size=job.train.batch_size,
        micro_batches=job.train.micro_batches,
        sequence_degree=2,
        ulysses=job.parallel.ulysses,
        num_shards=2,
        packed=True,
    )
    return replace(job, plan=solve_plan(request))


def runs(context: RankContext, jobs: tuple[TrainJob, ...], ports: tuple[int, ...]) -> list[list[dict[str, float]]]:
    """Metrics of the steps of jobs, one after the other: the first one stops early; the last is a mutant."""
    found = []
    for number, (job, port) in enumerate(zip(jobs, ports, strict=True)):
        axes = (Axis.data,) if number == len(jobs) - 1 else engine.TOKEN_AXES
        with patch.object(engine, "TOKEN_AXES", axes):
            stop_after = NUM_EARLY if number == 0 else None
            recorded = run_recorded(job, replace(context, master_port=port), stop_after=stop_after)
        found.append([report.metrics for report in recorded.reports])
    return found


def test_a_run_changes_its_degrees_and_counts_what_it_sends(tmp_path: Path) -> None:
    """Three steps with Ulysses, three with a ring from the checkpoint of those: the losses of one rank."""
    one = [report.metrics for report in run_recorded(tiny_job(tmp_path, run="one", **SHAPE)).reports]
    ulysses_job, ring_job = planned_job(tmp_path, ulysses=2), planned_job(tmp_path, ring=2)
    mutant = replace(ulysses_job, run_dir=str(tmp_path / "mutant"))
    jobs, ports = (ulysses_job, ring_job, mutant), tuple(free_port() for _ in range(3))
    early, late, wrong = run_distributed(partial(runs, jobs=jobs, ports=ports), 2)[0]
    assert [len(early), len(late)] == [NUM_EARLY, NUM_RUN_STEPS - NUM_EARLY]
    for name in (names.LOSS_TRAIN, names.GRAD_NORM, names.LOSS_EVAL, names.TOKENS_SEEN):
        values, expected = ([m[name] for m in steps if name in m] for steps in ((*early, *late), one))
        assert values == pytest.approx(expected, rel=1e-5), name
    assert wrong[0][names.LOSS_TRAIN] != pytest.approx(one[0][names.LOSS_TRAIN], rel=1e-3)
    for job, name, steps in ((ulysses_job, names.ULYSSES_SENT_GIB, early), (ring_job, names.RING_SENT_GIB, late)):
        assert job.plan.predicted[name] > 0
        assert {step[name] for step in steps} == {job.plan.predicted[name]}
    assert names.RING_SENT_GIB not in early[0]
