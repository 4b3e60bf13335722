"""Ranks that have stages of a pipeline: losses and weights of two steps are those of one plain process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from headrace.helpers.pipeline_mutants import MUTANTS, SHARED_MUTANTS, SPLIT_MUTANTS, broken
from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed
from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.stages import stage_requests
from headrace.storage.core.records import Medium
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, keep_layer
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.tensor_cut import shared
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.collectives import PIPELINE, TENSOR, Traffic
from headrace.workers.parallel.config import INTERLEAVED, V_HALF, ZBV, ParallelConfig, Vocabulary
from headrace.workers.parallel.context import TokenIndex
from headrace.workers.parallel.dims import TOKEN_AXES, Axis, ParallelDims, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.pipeline.actions import resolve_pipeline
from headrace.workers.parallel.pipeline.by_stage import ByStage, PipelineRank
from headrace.workers.parallel.pipeline.messages import Lines
from headrace.workers.parallel.process_group import process_group
from headrace.workers.parallel.ulysses import ContextGroup
from headrace.workers.telemetry import names
from headrace.workers.train.config import Precision
from headrace.workers.verify.steps import whole

CPU, SEQ_LEN, NUM_STEPS, NUM_MICRO_BATCHES, LR = torch.device("cpu"), 24, 2, 4, 0.1
DOCUMENTS = [[24], [11, 1, 3, 9]]
BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 5e-5)}


@dataclass(frozen=True)
class Case:
    """A model, and the ranks that have it.

    Args:
        plan: keep, or another name of plan_of.
        vocab_size: rows of the vocabulary; tokens are below 50.
        lora: whether adapters are trained, of every layer.
        kv_heads: of the model; fewer than tensor ranks are computed by several of them.
        mutant: name of what is broken on purpose.
    """

    model: str
    parallel: ParallelConfig
    num_layers: int = 3
    dtype: torch.dtype = torch.float64
    plan: str = "keep"
    vocab_size: int = 50
    lora: bool = False
    kv_heads: int = 2
    mutant: str = ""

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained."""
        return AdapterConfig(kind=AdapterKind.lora, rank=3, alpha=3.0) if self.lora else NO_ADAPTER


def case(model: str, degrees: dict[str, Any], **fields: Any) -> Case:
    return Case(model, ParallelConfig(**degrees), **fields)


def decoder(what: Case) -> Decoder:
    sizes = {"num_layers": what.num_layers, "vocab_size": what.vocab_size, "num_kv_heads": what.kv_heads}
    config = replace(MODELS[what.model], **sizes)
    model = Decoder(config, dtype=what.dtype, adapter=what.adapter)
    torch.manual_seed(0)
    for name, param in model.named_parameters():
        torch.nn.init.normal_(param, mean=float("norm" in name), std=0.3)
    return model


def batches(step: int, rows: slice = slice(None)) -> list[TokenBatch]:
    """The micro-batches of a step, with other numbers of targets each; or some of their two rows."""
    found = []
    for i in range(NUM_MICRO_BATCHES):
        tokens = torch.randint(0, 50, (2, SEQ_LEN), generator=torch.Generator().manual_seed(10 * step + i))
        targets = tokens.roll(-1, 1)
        targets[:, -3 - i :] = IGNORED_TARGET
        lengths = [length for row in DOCUMENTS[rows] for length in row]
        found.append(TokenBatch(tokens[rows], targets[rows], Packing.of_lengths(lengths)))
    return found


@torch.no_grad()
def update(model: torch.nn.Module) -> None:
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
        if param.grad is not None:
            param.sub_(LR * param.grad)


def plain_steps(what: Case) -> dict[str, Any]:
    """Losses of the steps of a plain process, and its weights after them."""
    torch.set_num_threads(1)
    model, losses = decoder(what), []
    for step in range(NUM_STEPS):
        model.zero_grad()
        num_targets, total = sum(each.num_targets for each in batches(step)), 0.0
        for own in batches(step):
            loss = model(own.tokens, own.targets, packing=own.packing, loss_tile=16) / num_targets
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        update(model)
    return {"losses": losses, "params": {name: param.detach() for name, param in model.named_parameters()}}


def plan_of(what: Case, skeleton: Any) -> MemoryPlan:
    front = (Stretch(0, 4, Residence.recompute), Stretch(4, None, Residence.hbm))
    mixed = {name: front for name in skeleton.skeletal if name != "x"} | {"x": (Stretch(0, None, Residence.hbm),)}
    layers = {
        "keep": keep_layer(skeleton),
        "recompute": LayerPlan.of(x=Residence.hbm),
        "front": LayerPlan(mixed),
        "one tile": keep_layer(skeleton),
    }
    cuts = Cuts() if what.plan == "one tile" else Cuts(token_tile=4, query_tile=4)
    return MemoryPlan(what.plan, (layers[what.plan],) * what.num_layers, cuts=cuts)


def planned_bytes(what: Case, dims: ParallelDims, rank: int) -> int:
    """What one rank of the pipeline sends to its tensor ranks."""
    request = PlanRequest(
        model=decoder(what).config,
        seq_len=SEQ_LEN,
        profile=HardwareProfile(name="test", device_class=DeviceClass.cpu),
        batch_size=2 // dims.data,
        micro_batches=NUM_MICRO_BATCHES,
        itemsize=what.dtype.itemsize,
        tensor_degree=dims.tensor,
        loss_tile=16,
        adapter=what.adapter,
    )
    pipeline = resolve_pipeline(what.parallel, NUM_MICRO_BATCHES)
    own = stage_requests(pipeline, request)[rank]
    plan = plan_of(what, request.skeleton()).of_layers(PipelineRank(pipeline, rank, what.num_layers).layers)
    return NUM_STEPS * sent_bytes(plan, own)[names.TENSOR_SENT_GIB]


def own_steps(context: RankContext, what: Case) -> dict[str, Any]:
    """The same of ranks of a pipeline; what they evaluate of the first micro-batch, and what this one sent."""
    dims = resolve_dims(what.parallel, context.world_size)
    meshes, model, traffic = Meshes.build(dims, "cpu"), decoder(what), Traffic()
    place = dims.coordinate(context.rank)
    part = PipelineRank(resolve_pipeline(what.parallel, NUM_MICRO_BATCHES), place[Axis.pipeline], what.num_layers)
    part.cut(model, meshes.stages)
    (skeleton, *_) = skeletons_of(model.blocks)
    degrees = {"tensor": dims.tensor, "ulysses": dims.ulysses, "ring": dims.ring}
    plan = plan_of(what, shared(skeleton, **degrees)).of_layers(part.layers)
    meter = DeviceMeter()
    handle = parallelize(
        model,
        mesh=meshes.params,
        precision=Precision.fp32,
        plan=plan,
        context=ContextGroup.of(meshes, traffic),
        meter=meter,
        layers=part.layers,
    )
    lines = Lines.of(dims, context.rank)
    sweep = ByStage(model, handle, meter, part, lines, traffic=traffic, loss_tile=16, dtype=what.dtype, device=CPU)
    index = TokenIndex.of(dims, context.rank, what.parallel.ring_layout, model.config.sliding_window)
    rows = slice(None) if dims.data == 1 else slice(place[Axis.data], place[Axis.data] + 1)
    losses = []

    def total(values: list[torch.Tensor]) -> float:
        found = torch.stack(values).double().sum()
        meshes.add_up(found, *TOKEN_AXES, Axis.pipeline)
        return float(found)

    for step in range(NUM_STEPS):
        own = [index.split(each) for each in batches(step, rows)]
        num_targets = sum(each.num_targets for each in batches(step))
        model.zero_grad()
        if step == 0:
            evaluated = total([sweep.evaluate(each) for each in own]) / num_targets
            traffic.take()
        losses.append(total(sweep.forward_backward(own, num_targets, step=step)) / num_targets)
        update(model)
    sweep.close()
    params = {name: whole(param.detach()) for name, param in model.named_parameters()}
    found = {"losses": losses, "params": params, "evaluated": evaluated, "peak": meter.peak_bytes}
    sent = traffic.take()
    return found | {"sent": sent.get(PIPELINE, 0), "to_tensor": sent.get(TENSOR, 0)}


def steps(context: RankContext, cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    found = []
    with process_group(context, CPU):
        for what in cases:
            with broken(what.mutant):
                found.append(own_steps(context, what))
    return found


def run(*cases: Case, num_ranks: int) -> list[dict[str, Any]]:
    """The steps of every case: the weights of all ranks together, and what each of them sent."""
    found = []
    for of_ranks in zip(*run_distributed(partial(steps, cases=cases), num_ranks), strict=True):
        params: dict[str, torch.Tensor] = {}
        named = [item for each in of_ranks for item in each["params"].items()]
        same = all([torch.equal(params.setdefault(name, param), param) for name, param in named])  # noqa: C419
        assert len({tuple(each["losses"]) for each in of_ranks}) == 1
        by_rank = {name: [each[name] for each in of_ranks] for name in ("sent", "to_tensor", "peak")}
        found.append({**of_ranks[0], "params": params, "same": same, **by_rank})
    return found


def errors(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Of losses and of weights, the largest."""
    assert found["params"].keys() == expected["params"].keys()
    of_loss = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], expected["losses"], strict=True))
    pairs = ((found["params"][name], param) for name, param in expected["params"].items())
    return of_loss, max(float((a - b).norm() / b.norm()) for a, b in pairs)


def check(what: Case, found: dict[str, Any]) -> None:
    expected = plain_steps(what)
    of_loss, of_params = errors(found, expected)
    loss_bound, params_bound = BOUNDS[what.dtype]
    assert of_loss <= loss_bound, what
    assert of_params <= params_bound, what
    assert found["same"], what  # at both ends of a tied weight
    assert found["evaluated"] == pytest.approx(expected["losses"][0], rel=max(loss_bound, 1e-12)), what


TWO = {"pipeline": 2}
TWO_BY_TWO = {"pipeline": 2, "pipeline_schedule": INTERLEAVED}
V_SHAPES = {name: {"pipeline": 2, "pipeline_schedule": name} for name in (ZBV, V_HALF)}


SENT = NUM_STEPS * NUM_MICRO_BATCHES * 2 * SEQ_LEN * 16 * 8  # bytes of hidden states, of all micro-batches


def test_two_steps_are_those_of_one_process() -> None:
    """Stages of two blocks and one, tied and untied; two stages of a rank; other plans; and every mutant fails."""
    tied, chunks = case("qwen3", TWO), case("qwen2", TWO_BY_TWO, num_layers=5)
    plans = [replace(tied, plan=name) for name in ("recompute", "front")]
    right = [tied, case("llama", TWO, plan="recompute"), chunks, case("mistral", TWO, dtype=torch.float32)]
    mutants = [replace(tied, mutant=name) for name in MUTANTS]
    found = run(*right, *plans, *mutants, num_ranks=2)
    for what, each in zip(right, found, strict=False):
        check(what, each)
    keep, others = found[0], found[len(right) :]
    for each in others[: len(plans)]:
        assert each["losses"] == keep["losses"]
        assert all(torch.equal(param, keep["params"][name]) for name, param in each["params"].items())
    expected = plain_steps(tied)
    for each, name in zip(others[len(plans) :], MUTANTS, strict=True):
        assert errors(each, expected)[1] > 1e-6, name
    # Rank 0 sends outputs and rank 1 gradients; with two stages each, two of the three borders are rank 0's outputs.
    assert keep["sent"] == [SENT, SENT]
    assert found[2]["sent"] == [3 * SENT, 3 * SENT]


def test_stages_share_their_weights_over_tensor_ranks() -> None:
    """A tied vocabulary of uneven shards at both ends, adapters, all schedules, shared KV heads; bytes, a mutant."""
    both = {"pipeline": 2, "tensor": 2}
    tied = case("qwen3", both, vocab_size=51)
    right = [
        tied,
        case("llama", both | TWO_BY_TWO, num_layers=5, lora=True, plan="front", vocab_size=51),
        case("qwen3", both | V_SHAPES[ZBV], num_layers=5, vocab_size=51, kv_heads=1),
        case("llama", both | V_SHAPES[V_HALF], num_layers=4, lora=True, plan="recompute", kv_heads=1),
    ]
    apart = "gradients of a tied weight are not summed"
    found = run(*right, replace(tied, plan="recompute"), replace(tied, mutant=apart), num_ranks=4)
    for what, each, edges in zip(right, found, (1, 3, 2, 2), strict=False):
        check(what, each)
        dims = resolve_dims(what.parallel, 4)
        assert each["sent"] == [edges * SENT // 2] * 4, what
        assert each["to_tensor"] == [planned_bytes(what, dims, rank) for rank in (0, 0, 1, 1)], what
    again, broken_one = found[len(right) :]
    assert again["losses"] == found[0]["losses"]
    assert all(torch.equal(param, found[0]["params"][name]) for name, param in again["params"].items())
    assert errors(broken_one, plain_steps(tied))[1] > 1e-6


def test_gradients_of_weights_in_passes_of_their_own() -> None:
    """zbv and v_half: two steps as one process makes them; plans to the bit; a metered peak; every mutant fails."""
    tied = case("qwen3", V_SHAPES[ZBV], num_layers=5, plan="one tile")
    right = [tied, case("llama", V_SHAPES[V_HALF], num_layers=4, plan="recompute")]
    plans = [case("mistral", V_SHAPES[ZBV], num_layers=4, plan=name) for name in ("keep", "recompute")]
    mutants = [replace(tied, mutant=name) for name in SPLIT_MUTANTS]
    found = run(*right, *plans, *mutants, num_ranks=2)
    for what, each in zip([*right, plans[0]], found, strict=False):
        check(what, each)
    keep, *others = found[len(right) : -len(mutants)]
    for each in others:
        assert each["losses"] == keep["losses"]
        assert all(torch.equal(param, keep["params"][name]) for name, param in each["params"].items())
    expected = plain_steps(tied)
    for each, name in zip(found[-len(mutants) :], SPLIT_MUTANTS, strict=True):
        assert errors(each, expected)[1] > 1e-6, name
    # Of three borders two lie between ranks; both ranks send outputs and gradients over them.
    assert found[1]["sent"] == [2 * SENT, 2 * SENT]
    for what, each in zip(plans, found[len(right) :], strict=False):
        assert each["peak"] == pytest.approx(planned_peaks(what), rel=0.003), what


def test_a_vocabulary_that_all_ranks_share() -> None:
    """Algorithms 1 and 2, tied and untied, even and uneven rows, under all schedules; every mutant fails."""
    tied = case("qwen3", TWO | {"vocabulary": Vocabulary.vocab_2}, vocab_size=51)
    right = [
        tied,
        case("llama", TWO | {"vocabulary": Vocabulary.vocab_1}, plan="recompute"),
        case("qwen2", V_SHAPES[ZBV] | {"vocabulary": Vocabulary.vocab_1}, num_layers=4, vocab_size=51),
        case("qwen3", V_SHAPES[V_HALF] | {"vocabulary": Vocabulary.vocab_2}, num_layers=4),
    ]
    mutants = [replace(tied, mutant=name) for name in SHARED_MUTANTS]
    found = run(*right, replace(tied, plan="recompute"), *mutants, num_ranks=2)
    for what, each in zip(right, found, strict=False):
        check(what, each)
    # 1f1b: a border; E; X or D; and in fp64 3 + 16 numbers a token of statistics and gradient.
    assert found[0]["sent"] == [3 * SENT + SENT * 19 // 16] * 2
    # zbv: two borders; rank 0 has both ends.
    assert found[2]["sent"] == [5 * SENT + SENT * 19 // 16, 3 * SENT + SENT * 19 // 16]
    assert found[0]["peak"] == pytest.approx(planned_peaks(tied), rel=0.01)
    again = found[len(right)]
    assert again["losses"] == found[0]["losses"]
    assert all(torch.equal(param, found[0]["params"][name]) for name, param in again["params"].items())
    expected = plain_steps(tied)
    for each, name in zip(found[len(right) + 1 :], SHARED_MUTANTS, strict=True):
        assert errors(each, expected)[1] > 1e-6, name


def planned_peaks(what: Case) -> list[int]:
    """Bytes on the device that the planner foresees for every rank."""
    model, pipeline = decoder(what).config, resolve_pipeline(what.parallel, NUM_MICRO_BATCHES)
    profile = HardwareProfile(name="cpu", evidence=Evidence.measured, device_class=DeviceClass.cpu)
    asked = PlanRequest(
        model=model,
        seq_len=SEQ_LEN,
        profile=profile,
        batch_size=2,
        micro_batches=NUM_MICRO_BATCHES,
        itemsize=what.dtype.itemsize,
        packed=True,
        loss_tile=16,
    )
    plan, found = plan_of(what, asked.skeleton()), []
    for rank, own in enumerate(stage_requests(pipeline, asked)):
        layers = PipelineRank(pipeline, rank, what.num_layers).layers
        found.append(wanted_bytes(plan.of_layers(layers), own)[Medium.hbm])
    return found


@pytest.mark.soak
@pytest.mark.parametrize(
    "degrees",
    [
        {"pipeline": 4},
        {"pipeline": 4, "pipeline_schedule": ZBV},
        {"pipeline": 4, "pipeline_schedule": V_HALF, "vocabulary": Vocabulary.vocab_2},
        {"pipeline": 4, "vocabulary": Vocabulary.vocab_1},
        {"pipeline": 2, "data": 2, "pipeline_schedule": ZBV, "vocabulary": Vocabulary.vocab_2},
        {"pipeline": 2, "ring": 2, "pipeline_schedule": V_HALF, "vocabulary": Vocabulary.vocab_1},
        {"pipeline": 2, "data": 2, "fsdp": 1, "vocabulary": Vocabulary.vocab_2},
        {"pipeline": 2, "tensor": 2},
        {"pipeline": 2, "tensor": 2, "pipeline_schedule": ZBV},
        {"pipeline": 2, "data": 2},
        {"pipeline": 2, "data": 2, "fsdp": 1},
        {"pipeline": 2, "ring": 2},
        {"pipeline": 2, "ulysses": 2, "pipeline_schedule": INTERLEAVED, "vocabulary": Vocabulary.vocab_2},
    ],
)
def test_soak_other_degrees(degrees: dict[str, Any]) -> None:
    cases = [
        case(model, degrees, num_layers=8, dtype=dtype, plan=plan, vocab_size=53)
        for model, plan in (("qwen3", "keep"), ("llama", "recompute"), ("mistral", "front"))
        for dtype in BOUNDS
    ]
    for what, found in zip(cases, run(*cases, num_ranks=4), strict=True):
        check(what, found)


@pytest.mark.soak
@pytest.mark.parametrize("context", ["ring", "ulysses", "data"])
def test_soak_three_degrees(context: str) -> None:
    """Eight ranks."""
    what = case("qwen3", {"pipeline": 2, "tensor": 2, context: 2}, plan="recompute")
    check(what, *run(what, num_ranks=8))
