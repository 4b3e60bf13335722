"""The sweep by chunk of ranks that share weights or rows: two steps are those of one plain process."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.sharing import (
    LOSS_TILE,
    SEQ_LEN,
    Case,
    case,
    check,
    check_errors,
    decoder,
    errors,
    kv_shape,
    plain_steps,
    plan_of,
    run,
    steps_of,
)
from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed, run_recorded, tiny_job, tiny_leases
from headrace.kernels.api import Packing
from headrace.platform.planning import priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.ports import free_port
from headrace.storage.core.records import Direction, Medium
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.chunk_plan import pass_bytes
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.decoder import Decoder
from headrace.workers.parallel import tensor, ulysses
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.config import ParallelConfig, RingLayout
from headrace.workers.parallel.context import SplitPacking, TokenIndex
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.process_group import process_group
from headrace.workers.parallel.tensor import share_weights
from headrace.workers.parallel.ulysses import ContextGroup, share_blocks
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import Stage, StepPart
from headrace.workers.train.config import CheckpointConfig
from headrace.workers.train.session import run_rank
from headrace.workers.verify.ours import open_tiers

CPU = torch.device("cpu")
TENSOR, ULYSSES = {"tensor": 2}, {"ulysses": 2}
PROFILE = HardwareProfile(name="test", device_class=DeviceClass.cpu)


def steps(context: RankContext, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    return steps_of(context, cases, MUTANTS)


FAMILIES = (
    case("qwen3", TENSOR, plan="chunk_host", kv_heads=1),
    case("llama", TENSOR, plan="chunk_tiles", documents=False),
    case("llama", TENSOR, plan="chunk_ssd", lora=True),
    case("mistral", TENSOR, plan="chunk_mixed", dtype=torch.float32),
    case("qwen3", ULYSSES, plan="chunk_host", kv_heads=1),
    case("llama", ULYSSES, plan="chunk_tiles", documents=False),
    case("mistral", ULYSSES, plan="chunk_mixed"),
    case("qwen2", ULYSSES, plan="chunk_ssd", dtype=torch.float32),
)
# Of the first case of each degree, with other residences.
OF_TENSOR, OF_ULYSSES = FAMILIES[0], FAMILIES[4]
PLANS = tuple(replace(what, plan=plan) for what in (OF_TENSOR, OF_ULYSSES) for plan in ("chunk", "chunk_mixed"))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What ranks have found, by word: one start of them for all cases."""
    mutants = [replace(what, plan="chunk", mutant=name) for name, (what, _) in zip(MUTANTS, WRONG, strict=True)]
    results = iter(run(steps, *FAMILIES, *PLANS, *mutants, num_ranks=2))
    of_families, of_plans = (list(islice(results, len(cases))) for cases in (FAMILIES, PLANS))
    return {"families": of_families, "plans": of_plans, "mutants": list(results)}


def test_two_steps_are_those_of_one_process(found: dict[str, Any]) -> None:
    for what, own in zip(FAMILIES, found["families"], strict=True):
        check_errors(what, own)


def test_bytes_sent_and_moved_are_those_planned(found: dict[str, Any]) -> None:
    for what, own in zip((*FAMILIES, *PLANS), (*found["families"], *found["plans"]), strict=True):
        sent, moved = planned_bytes(what)
        assert own["sent"] == [sent] * len(own["sent"]), what
        assert own["moved"] == [moved] * len(own["moved"]), what


def planned_bytes(what: Case) -> tuple[dict[str, int], dict[tuple[Medium, Direction], int]]:
    """What a rank sends in a step, and what its blocks move."""
    config = decoder(what).config
    request = PlanRequest(
        model=config,
        seq_len=SEQ_LEN,
        profile=PROFILE,
        batch_size=2,
        itemsize=what.dtype.itemsize,
        tensor_degree=what.parallel.tensor,
        sequence_degree=what.parallel.ulysses,
        ulysses=what.parallel.ulysses,
        loss_tile=LOSS_TILE,
        adapter=what.adapter,
    )
    plan = plan_of(what, config.num_layers, request.skeleton())
    by_name = {names.TENSOR_SENT_GIB: "tensor", names.ULYSSES_SENT_GIB: "ulysses"}
    sent = {by_name[name]: num_bytes for name, num_bytes in sent_bytes(plan, request).items()}
    kv = pass_bytes(plan, request.skeletons(), kv_shape(what, request.skeletons(), config.sliding_window))
    moved = {(tier, Direction.store): n for tier, n in kv.stored.items() if n}
    return sent, moved | {(tier, Direction.load): n for tier, n in kv.loaded.items() if n}


def test_residence_changes_no_bit(found: dict[str, Any]) -> None:
    for number, what in enumerate(PLANS):
        own, first = found["plans"][number], found["families"][FAMILIES.index(replace(what, plan="chunk_host"))]
        assert own["losses"] == first["losses"]
        assert all(torch.equal(param, first["params"][name]) for name, param in own["params"].items())


RIGHT_EXCHANGE = ulysses.ContextGroup.exchange


def kept_at_home(self: Any, tensors: Any, *, to_heads: bool) -> Any:
    """Gradients of exchanged queries and keys stay where attention has made them."""
    wrong = (lambda parts, group, traffic: parts) if not to_heads and len(tensors) == 2 else ulysses.all_to_all
    with patch.object(ulysses, "all_to_all", wrong):
        return RIGHT_EXCHANGE(self, tensors, to_heads=to_heads)


def local(self: Any, batch_size: int, seq_len: int, device: Any, span: Any = None) -> torch.Tensor:
    """Positions that begin at 0 in every part of a chunk."""
    return torch.arange(self.places.shape[1]).expand(batch_size, -1)


WRONG: tuple[tuple[Case, Any], ...] = (
    (OF_TENSOR, [(tensor, "all_reduce_", lambda grads, group, traffic: grads)]),
    (OF_ULYSSES, [(ulysses.ContextGroup, "exchange", kept_at_home)]),
    (OF_TENSOR, [(SplitPacking, "positions", local)]),
    (OF_ULYSSES, [(SplitPacking, "positions", local)]),
)
MUTANTS = {str(number): broken for number, (_, broken) in enumerate(WRONG, 1)}


def test_every_mutant_fails(found: dict[str, Any]) -> None:
    """Gradients of norms that are not summed, of keys that are not sent back; local positions with either degree."""
    for own, (what, broken) in zip(found["mutants"], WRONG, strict=True):
        assert errors(own, plain_steps(what))[1] > 1e-6, (what, broken)


@pytest.mark.soak
@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor": 4},
        {"ulysses": 4},
        {"tensor": 2, "ulysses": 2},
        {"tensor": 2, "data": 2},
        {"ulysses": 2, "data": 2, "fsdp": 2},
    ],
)
def test_soak_other_degrees(degrees: dict[str, int]) -> None:
    forms: list[dict[str, Any]] = [{"plan": "chunk_ssd"}, {"plan": "chunk", "documents": False, "dtype": torch.float32}]
    cases = [
        case(model, degrees, kv_heads=4, **form) for model in ("llama", "qwen2", "qwen3", "mistral") for form in forms
    ]
    num_ranks = math.prod(degrees.get(name, 1) for name in ("tensor", "data", "ulysses"))
    check(steps, *cases, num_ranks=num_ranks)


SMALL = replace(MODELS["llama"], vocab_size=512, hidden_size=64, num_layers=4, num_heads=8, intermediate_size=160)


def peaks(context: RankContext, degrees: tuple[dict[str, int], ...]) -> list[tuple[int, int, int]]:
    """Live tensors of a step, the meter's and the planned bytes, at their peaks; gradients of parameters apart."""
    torch.set_num_threads(1)
    found = []
    with process_group(context, CPU):
        for own in degrees:
            dims, meter, log = resolve_dims(ParallelConfig(**own), 2), DeviceMeter(), TransferLog()
            meshes, model = Meshes.build(dims, "cpu"), Decoder(SMALL)
            model.init_weights(0)
            group = ContextGroup.of(meshes, Traffic())
            assert group is not None
            if group.tensor is not None:
                share_weights(model, group.tensor)
                for name, param in list(model.named_parameters()):  # without FSDP2, which gathers whole weights
                    owner, _, leaf = name.rpartition(".")
                    model.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(param.to_local()))
            share_blocks(list(model.blocks), group)
            request = PlanRequest(
                model=SMALL,
                seq_len=640,
                profile=PROFILE,
                preset=MemoryPreset.chunk_host,
                chunk_size=128,
                tensor_degree=dims.tensor,
                sequence_degree=dims.ulysses,
                ulysses=dims.ulysses,
                loss_tile=64,
            )
            plan = solve_plan(request)
            params = list(model.parameters())
            for param in params:
                param.grad = torch.zeros_like(param)
            tokens = torch.randint(0, 512, (1, 640), generator=torch.Generator().manual_seed(0))
            whole = TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([640]))
            batch = TokenIndex.of(dims, context.rank, RingLayout.auto, None).split(whole)
            wanted = priced.wanted_bytes(plan, request)
            tiers = {tier: wanted[tier] for tier in (Medium.host, Medium.ssd)}
            with open_tiers(tiers, CPU, log) as stack:
                handle = apply_plan(model, plan, stack, meter=meter, bucket_plans=None)
                sweep = open_sweep(model, handle, meter, loss_tile=64, itemsize=4)
                given = [batch.tokens, batch.targets, whole.tokens, whole.targets]
                with LiveBytes([*params, *(param.grad for param in params), *given]) as live:
                    sweep.forward_backward(batch, 1.0, step=0, micro_batch=0)
                sweep.close()
            found.append((live.peak, meter.peak_bytes, wanted[Medium.hbm]))
    return found


def test_the_meter_and_the_plan_count_all_live_tensors() -> None:
    for live, metered, planned in run_distributed(partial(peaks, degrees=(TENSOR, ULYSSES)), 2)[0]:
        assert metered == pytest.approx(live, rel=0.03)
        assert planned == pytest.approx(live, rel=0.05)


RUN: dict[str, Any] = {
    "model": {"init_std": 0.1},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "train": {"steps": 6, "eval_every": 2, "eval_batches": 2, "grad_clip": 0.5},
    "checkpoint": {"at_end": True},
}


def planned_job(folder: Path, preset: MemoryPreset, run: str = "shared", **degrees: int) -> TrainJob:
    """A job of two ranks in chunks of 12 tokens, of rows of 32. A step has four rows at any degree."""
    shape = RUN if degrees else RUN | {"train": RUN["train"] | {"batch_size": 1}}
    job = tiny_job(folder, run=run, parallel=degrees, **shape)
    request = PlanRequest(
        model=job.model,
        seq_len=job.data.seq_len,
        profile=PROFILE,
        preset=preset,
        batch_size=job.train.batch_size,
        micro_batches=job.train.micro_batches,
        chunk_size=12,
        tensor_degree=job.parallel.tensor,
        sequence_degree=job.parallel.ulysses,
        ulysses=job.parallel.ulysses,
        num_shards=2 // job.parallel.tensor,
        loss_tile=job.train.loss_tile,
        packed=True,
    )
    return replace(job, plan=solve_plan(request))


class Killed(Exception):
    """Stands for the SIGKILL of a rank."""


def in_last_chunk(stage: Stage, part: StepPart | None = None) -> None:
    if part is not None and (part.micro_batch, part.stage, part.number) == (2, 2, 3):
        raise Killed


def runs(
    context: RankContext, jobs: tuple[TrainJob, ...], ended: tuple[TrainJob, ...], ports: tuple[int, ...]
) -> tuple[list[Any], list[Any]]:
    """Metrics of the steps of jobs that follow each other, two steps each; then of those that end inside a step.

    Args:
        ended: in turn jobs that end in the last chunk of their first step, and go on.
    """
    left = iter(ports)
    found = []
    for number, job in enumerate(jobs):
        recorded = run_recorded(job, replace(context, master_port=next(left)), stop_after=2 * number + 2)
        found.append([report.metrics for report in recorded.reports])
    resumed = []
    for job in ended:
        calls: dict[str, Any] = {"on_step": lambda report: None, "should_stop": lambda: False}
        with pytest.raises(Killed):
            run_rank(job, replace(context, master_port=next(left)), on_stage=in_last_chunk, **calls)
        again = run_recorded(job, replace(context, master_port=next(left), attempt=1), stop_after=2)
        resumed.append(([report.metrics for report in again.reports], again.events))
    return found, resumed


def test_a_run_changes_its_degrees_and_goes_on_inside_a_step(tmp_path: Path) -> None:
    """Two steps with shared weights, two with shared rows, two with shards alone, each from the checkpoint before."""
    alone = [report.metrics for report in run_recorded(tiny_job(tmp_path, run="one", **RUN)).reports]
    jobs = (
        planned_job(tmp_path, MemoryPreset.chunk_host, tensor=2),
        planned_job(tmp_path, MemoryPreset.chunk_ssd, ulysses=2),
        planned_job(tmp_path, MemoryPreset.chunk),
    )
    keeps = CheckpointConfig(every=1, every_chunks=1, at_end=False)
    ended = tuple(
        replace(planned_job(tmp_path, MemoryPreset.chunk_host, run=name, **{name: 2}), checkpoint=keeps)
        for name in ("tensor", "ulysses")
    )
    ports = tuple(free_port() for _ in range(len(jobs) + 2 * len(ended)))
    with tiny_leases(tmp_path, num_ranks=2) as leases:
        found, resumed = run_distributed(partial(runs, jobs=jobs, ended=ended, ports=ports), 2, leases=leases)[0]
    assert [len(metrics) for metrics in found] == [2, 2, 2]
    for name in (names.LOSS_TRAIN, names.GRAD_NORM, names.LOSS_EVAL, names.TOKENS_SEEN):
        values, expected = ([m[name] for m in steps if name in m] for steps in ((m for ms in found for m in ms), alone))
        assert values == pytest.approx(expected, rel=1e-5), name
    for job, metrics, sent in zip(jobs, found, (names.TENSOR_SENT_GIB, names.ULYSSES_SENT_GIB, None), strict=True):
        moved = (names.HOST_STORED_GIB, names.HOST_LOADED_GIB, names.SSD_STORED_GIB, names.SSD_LOADED_GIB)
        for name in (sent, *moved, names.HOST_PEAK_GIB, names.SSD_PEAK_GIB):
            if name is not None:
                assert [step.get(name, 0.0) for step in metrics] == [job.plan.predicted[name]] * 2, name
    keys = (names.LOSS_TRAIN, names.GRAD_NORM)
    curves = [[step[key] for step in steps for key in keys] for steps in (found[0], *(own for own, _ in resumed))]
    assert curves[1] == curves[0]
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    for _, events in resumed:
        assert "goes on in micro-batch 2, after chunk 2 of stage 2" in events["step_resumed"]
