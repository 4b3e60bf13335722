"""Ranks that share the tokens of a row: losses, gradients and weights of two steps are those of one plain process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed, run_recorded, tiny_job
from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.kernels.attention.cut import Reading
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.ports import free_port
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, keep_layer
from headrace.workers.memory.sweeps import open_sweep
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.exchanged import exchanged
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.parallel import ring_cut, ulysses
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.config import ParallelConfig, RingLayout
from headrace.workers.parallel.context import SplitPacking, TokenIndex
from headrace.workers.parallel.dims import TOKEN_AXES, Axis, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.process_group import process_group
from headrace.workers.parallel.ulysses import ContextGroup
from headrace.workers.telemetry import names
from headrace.workers.train import engine
from headrace.workers.train.config import Precision

CPU, SEQ_LEN, NUM_STEPS, LR = torch.device("cpu"), 48, 2, 0.1
# Of two rows: one document in the first, and in the second several: one of a single token, one longer than a part.
DOCUMENTS = [[48], [21, 1, 3, 2, 14, 7]]
BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 5e-5)}
RING_2_ULYSSES_2 = {"ring": 2, "ulysses": 2}


@dataclass(frozen=True)
class Case:
    """A model, and how ranks share its rows.

    Args:
        plan: name of one of PLANS.
        mutant: name of what is broken on purpose.
    """

    model: str
    parallel: ParallelConfig
    dtype: torch.dtype = torch.float64
    documents: bool = True
    kv_heads: int = 2
    plan: str = "keep"
    mutant: str = ""


def case(model: str, degrees: dict[str, Any], **fields: Any) -> Case:
    return Case(model, ParallelConfig(**degrees), **fields)


def decoder(what: Case) -> Decoder:
    model = Decoder(replace(MODELS[what.model], num_kv_heads=what.kv_heads), dtype=what.dtype)
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    return model


def batch(documents: bool, number: int, rows: slice = slice(None)) -> TokenBatch:
    """Some of the two rows of a step."""
    tokens = torch.randint(0, 50, (2, SEQ_LEN), generator=torch.Generator().manual_seed(number))
    targets = tokens.roll(-1, 1)
    targets[:, -3:] = IGNORED_TARGET
    lengths = [length for row in DOCUMENTS[rows] for length in (row if documents else [SEQ_LEN])]
    return TokenBatch(tokens[rows], targets[rows], Packing.of_lengths(lengths))


@torch.no_grad()
def update(model: torch.nn.Module) -> None:
    for param in model.parameters():
        assert param.grad is not None
        param -= LR * param.grad


def plain_steps(what: Case) -> dict[str, Any]:
    """Losses of the steps of a plain process, and its weights after them."""
    torch.set_num_threads(1)
    model, losses = decoder(what), []
    for step in range(NUM_STEPS):
        own = batch(what.documents, step)
        model.zero_grad()
        loss = model(own.tokens, own.targets, packing=own.packing, loss_tile=16) / own.num_targets
        loss.backward()
        losses.append(float(loss.detach()))
        update(model)
    return {"losses": losses, "params": {name: param.detach() for name, param in model.named_parameters()}}


def plan_of(what: Case, num_layers: int, skeleton: Any) -> MemoryPlan:
    """The plan of a case. All have the same cuts."""
    front = (Stretch(0, 4, Residence.recompute), Stretch(4, None, Residence.hbm))
    mixed = {name: front for name in skeleton.skeletal if name != "x"} | {"x": (Stretch(0, None, Residence.hbm),)}
    layers = {
        "keep": keep_layer(skeleton),
        "recompute": LayerPlan.of(x=Residence.hbm),
        "results": LayerPlan.of(x=Residence.hbm, out=Residence.hbm, lse=Residence.hbm),
        "front": LayerPlan(mixed),
    }
    return MemoryPlan(what.plan, (layers[what.plan],) * num_layers, cuts=Cuts(token_tile=4, query_tile=4))


def own_steps(context: RankContext, what: Case) -> dict[str, Any]:
    """The same of ranks that share the rows; and what they evaluate of the first batch."""
    dims = resolve_dims(what.parallel, context.world_size)
    meshes, model = Meshes.build(dims, "cpu"), decoder(what)
    index = TokenIndex.of(dims, context.rank, what.parallel.ring_layout, model.config.sliding_window)
    plan = plan_of(what, model.config.num_layers, exchanged(dense_skeleton(model.config), dims.ulysses, dims.ring))
    group = ContextGroup.of(meshes, Traffic())
    handle = parallelize(model, mesh=meshes.params, precision=Precision.fp32, plan=plan, context=group)
    sweep = open_sweep(model, handle, None, loss_tile=16, itemsize=8)
    losses, evaluated = [], 0.0
    rows = slice(None) if dims.data == 1 else slice(place := dims.coordinate(context.rank)[Axis.data], place + 1)
    for step in range(NUM_STEPS):
        whole, own = batch(what.documents, step), index.split(batch(what.documents, step, rows))
        model.zero_grad()
        if step == 0:
            evaluated = summed(sweep.evaluate(own), meshes) / whole.num_targets
            model.reshard()
        loss = sweep.forward_backward(own, whole.num_targets, step=step, micro_batch=0)
        losses.append(summed(loss, meshes) / whole.num_targets)
        update(model)
    params = {name: param.full_tensor().detach() for name, param in model.named_parameters()}
    sweep.close()
    return {"losses": losses, "params": params, "evaluated": evaluated}


def summed(value: torch.Tensor, meshes: Meshes) -> float:
    total = value.detach().double()
    meshes.add_up(total, *TOKEN_AXES)
    return float(total)


def steps_of(context: RankContext, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """Of several cases, one after the other in the same ranks."""
    torch.set_num_threads(1)
    found = []
    with process_group(context, CPU):
        for what in cases:
            with broken(what.mutant):
                found.append(own_steps(context, what))
    return found


def run(*cases: Case, num_ranks: int) -> list[dict[str, Any]]:
    """What rank 0 found of every case; the others must have found the same."""
    ranks = run_distributed(partial(steps_of, cases=cases), num_ranks)
    for other in ranks[1:]:
        for what, mine, theirs in zip(cases, ranks[0], other, strict=True):
            assert mine["losses"] == theirs["losses"], what
            for name, param in mine["params"].items():
                assert torch.equal(param, theirs["params"][name]), (what, name, param, theirs["params"][name])
    return ranks[0]


def errors(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Relative, of the losses (those of training and of evaluation) and of the worst parameter."""
    pairs = [*zip(found["losses"], expected["losses"], strict=True), (found["evaluated"], expected["losses"][0])]
    of_loss = max(abs(mine - wanted) / abs(wanted) for mine, wanted in pairs)
    params = ((found["params"][name], wanted) for name, wanted in expected["params"].items())
    return of_loss, max(float((mine - wanted).norm() / wanted.norm()) for mine, wanted in params)


def check(*cases: Case, num_ranks: int) -> None:
    for what, found in zip(cases, run(*cases, num_ranks=num_ranks), strict=True):
        of_loss, of_params = errors(found, plain_steps(what))
        assert of_loss < BOUNDS[what.dtype][0], what
        assert of_params < BOUNDS[what.dtype][1], what


def test_two_steps_are_those_of_one_process() -> None:
    """Heads with norms and tied weights, a window, biases and stripes; one start of ranks for all of them."""
    striped = {"ring": 2, "ring_layout": RingLayout.striped}
    check(
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
    check(what, num_ranks=num_ranks)


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


@contextmanager
def broken(mutant: str) -> Iterator[None]:
    with ExitStack() as stack:
        for where, name, wrong in MUTANTS.get(mutant, []):
            stack.enter_context(patch.object(where, name, wrong, create=True))
        yield


def test_plans_are_equal_to_the_bit_and_every_mutant_fails() -> None:
    """Ring 2 x Ulysses 2 with one KV head, which both Ulysses ranks have. One start of ranks for all of it."""
    plain = case("llama", RING_2_ULYSSES_2, kv_heads=1)
    plans = [replace(plain, plan=name) for name in ("keep", "recompute", "results", "front")]
    mutants = [replace(plain, mutant=name) for name in MUTANTS]
    keep, *others = run(*plans, *mutants, num_ranks=4)
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
