"""Two steps of ranks that share rows or weights, beside those of one plain process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from headrace.helpers.tiny_models import MODELS
from headrace.helpers.training import run_distributed
from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.storage.core.records import Medium
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext
from headrace.workers.memory.chunk_plan import KvShape, pass_bytes
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, Sweep, keep_layer
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.sweeps import open_sweep
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import Skeleton, chunk_skeleton
from headrace.workers.model.tensor_cut import shared
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.collectives import Traffic
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.parallel.context import TokenIndex
from headrace.workers.parallel.dims import TOKEN_AXES, Axis, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.process_group import process_group
from headrace.workers.parallel.ulysses import ContextGroup
from headrace.workers.train.config import Precision
from headrace.workers.verify.ours import open_tiers
from headrace.workers.verify.steps import whole as whole_of

CPU, SEQ_LEN, LOSS_TILE, NUM_STEPS, LR = torch.device("cpu"), 48, 16, 2, 0.1
# Of two rows: one document in the first, and in the second several: one of a single token, one longer than a part.
DOCUMENTS = [[48], [21, 1, 3, 2, 14, 7]]
# By chunk: the last one is shorter, and KV blocks do not end with chunks.
CHUNK, KV_BLOCK, EARLY = 20, 8, ("x", "q", "out", "lse", "residual")
HBM, HOST, SSD = ((Stretch(0, None, place),) for place in (Residence.hbm, Residence.host, Residence.ssd))
KV_PLACES = {
    "chunk": HBM,
    "chunk_tiles": HOST,
    "chunk_host": HOST,
    "chunk_ssd": SSD,
    "chunk_mixed": (Stretch(0, 8, Residence.hbm), Stretch(8, 24, Residence.host), Stretch(24, None, Residence.ssd)),
}
BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 5e-5)}
Mutants = Mapping[str, Sequence[tuple[Any, str, Any]]]


@dataclass(frozen=True)
class Case:
    """A model, and how ranks share its rows.

    Args:
        plan: name of one of PLANS.
        tied: of the embeddings; None: as the model has it.
        lora: whether adapters are trained, of every layer.
        mutant: name of what is broken on purpose.
    """

    model: str
    parallel: ParallelConfig
    dtype: torch.dtype = torch.float64
    documents: bool = True
    kv_heads: int = 2
    plan: str = "keep"
    tied: bool | None = None
    lora: bool = False
    mutant: str = ""

    @property
    def adapter(self) -> AdapterConfig:
        """What is trained."""
        return AdapterConfig(kind=AdapterKind.lora, rank=3, alpha=3.0) if self.lora else NO_ADAPTER


def case(model: str, degrees: dict[str, Any], **fields: Any) -> Case:
    """A case with these parallel degrees."""
    return Case(model, ParallelConfig(**degrees), **fields)


def decoder(what: Case) -> Decoder:
    """The model of a case with its first weights."""
    config = replace(MODELS[what.model], num_kv_heads=what.kv_heads, vocab_size=51, pad_token_id=30)
    if what.tied is not None:
        config = replace(config, tie_embeddings=what.tied)
    model = Decoder(config, dtype=what.dtype, adapter=what.adapter)
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
    """A step of plain gradient descent."""
    for param in (param for param in model.parameters() if param.requires_grad):
        assert param.grad is not None
        param.sub_(LR * param.grad)


def plain_steps(what: Case) -> dict[str, Any]:
    """Losses of the steps of a plain process, and its weights after them."""
    torch.set_num_threads(1)
    model, losses = decoder(what), []
    for step in range(NUM_STEPS):
        own = batch(what.documents, step)
        model.zero_grad()
        loss = model(own.tokens, own.targets, packing=own.packing, loss_tile=LOSS_TILE) / own.num_targets
        loss.backward()
        losses.append(float(loss.detach()))
        update(model)
    return {"losses": losses, "params": {name: param.detach() for name, param in model.named_parameters()}}


def plan_of(what: Case, num_layers: int, skeleton: Any) -> MemoryPlan:
    """The plan of a case. All of one sweep have the same cuts, but chunk_tiles."""
    front = (Stretch(0, 4, Residence.recompute), Stretch(4, None, Residence.hbm))
    mixed = {name: front for name in skeleton.skeletal if name != "x"} | {"x": (Stretch(0, None, Residence.hbm),)}
    layers = {
        "keep": keep_layer(skeleton),
        "recompute": LayerPlan.of(x=Residence.hbm),
        "results": LayerPlan.of(x=Residence.hbm, out=Residence.hbm, lse=Residence.hbm),
        "front": LayerPlan(mixed),
    }
    cuts = Cuts(token_tile=4, query_tile=4)
    if what.plan in KV_PLACES:
        kv, of_chunk = KV_PLACES[what.plan], chunk_skeleton(skeleton)
        early = [name for name in of_chunk.skeletal if name in EARLY]
        layer = keep_layer(of_chunk) if what.plan == "chunk" else LayerPlan.of(**dict.fromkeys(early, Residence.hbm))
        tile = cuts.query_tile if what.plan == "chunk_tiles" else None  # every tile reads all keys
        cuts = replace(cuts, query_tile=tile, chunks=(CHUNK,), kv_block=KV_BLOCK)
        rows = (layer,) * num_layers
        return MemoryPlan(what.plan, rows, sweep=Sweep.by_chunk, cuts=cuts, kv=kv, kv_grads=kv)
    return MemoryPlan(what.plan, (layers[what.plan],) * num_layers, cuts=cuts)


def own_steps(context: RankContext, what: Case) -> dict[str, Any]:
    """The same of ranks that share rows or weights.

    Returns:
        Also what they evaluate of the first batch, and of every step the bytes that a rank sends and those that move
        between tiers, by direction and tier.
    """
    dims = resolve_dims(what.parallel, context.world_size)
    meshes, model = Meshes.build(dims, "cpu"), decoder(what)
    config = model.config
    index = TokenIndex.of(dims, context.rank, what.parallel.ring_layout, config.sliding_window)
    (whole, *_) = skeletons_of(model.blocks)
    skeleton = shared(whole, tensor=dims.tensor, ulysses=dims.ulysses, ring=dims.ring)
    plan = plan_of(what, config.num_layers, skeleton)
    traffic, log = Traffic(), TransferLog()
    group = ContextGroup.of(meshes, traffic)
    rows = slice(None) if dims.data == 1 else slice(place := dims.coordinate(context.rank)[Axis.data], place + 1)
    losses, sent, moved, evaluated = [], [], [], 0.0
    with open_tiers(tier_bytes(what, plan, [skeleton] * config.num_layers, config.sliding_window), CPU, log) as stack:
        handle = parallelize(model, mesh=meshes.params, precision=Precision.fp32, plan=plan, stack=stack, context=group)
        sweep = open_sweep(model, handle, None, loss_tile=LOSS_TILE, itemsize=what.dtype.itemsize)
        for step in range(NUM_STEPS):
            of_all, own = batch(what.documents, step), index.split(batch(what.documents, step, rows))
            model.zero_grad()
            if step == 0:
                evaluated = summed(sweep.evaluate(own), meshes) / of_all.num_targets
                model.reshard()  # type: ignore[operator]
            traffic.take()
            log.moved_bytes.clear()
            loss = sweep.forward_backward(own, of_all.num_targets, step=step, micro_batch=0)
            sent.append(traffic.take())
            moved.append(dict(log.moved_bytes))
            losses.append(summed(loss, meshes) / of_all.num_targets)
            update(model)
        params = {name: whole_of(param).detach() for name, param in model.named_parameters()}
        sweep.close()
    return {"losses": losses, "params": params, "evaluated": evaluated, "sent": sent, "moved": moved}


def tier_bytes(what: Case, plan: MemoryPlan, skeletons: Sequence[Skeleton], window: int | None) -> dict[Medium, int]:
    """What a step fills of every tier."""
    if plan.sweep is Sweep.by_layer:
        return dict.fromkeys((Medium.host, Medium.ssd), 0)
    return pass_bytes(plan, skeletons, kv_shape(what, skeletons, window)).slots


def kv_shape(what: Case, skeletons: Sequence[Skeleton], window: int | None) -> KvShape:
    """Of both rows of a case."""
    return KvShape.of(skeletons, batch_size=2, num_tokens=SEQ_LEN, itemsize=what.dtype.itemsize, window=window)


def summed(value: torch.Tensor, meshes: Meshes) -> float:
    """Over ranks that have other tokens."""
    total = value.detach().double()
    meshes.add_up(total, *TOKEN_AXES)
    return float(total)


def steps_of(context: RankContext, cases: Sequence[Case], mutants: Mutants) -> list[dict[str, Any]]:
    """Of several cases, one after the other in the same ranks.

    Args:
        mutants: by name, what to put in the place of which attributes.
    """
    torch.set_num_threads(1)
    found = []
    with process_group(context, CPU):
        for what in cases:
            with ExitStack() as broken:
                for where, name, wrong in mutants.get(what.mutant, ()):
                    broken.enter_context(patch.object(where, name, wrong, create=True))
                found.append(own_steps(context, what))
    return found


def run(steps: Callable[..., Any], *cases: Case, num_ranks: int) -> list[dict[str, Any]]:
    """What rank 0 found of every case; but for mutants the others must have found the same.

    Args:
        steps: (context, cases=) to `steps_of` with the mutants of a test.
    """
    ranks = run_distributed(partial(steps, cases=cases), num_ranks)
    for other in ranks[1:]:
        for what, mine, theirs in zip(cases, ranks[0], other, strict=True):
            assert what.mutant or mine["losses"] == theirs["losses"], what
            for name, param in () if what.mutant else mine["params"].items():
                assert torch.equal(param, theirs["params"][name]), (what, name, param, theirs["params"][name])
    return ranks[0]


def errors(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Relative, of the losses (those of training and of evaluation) and of the worst parameter."""
    pairs = [*zip(found["losses"], expected["losses"], strict=True), (found["evaluated"], expected["losses"][0])]
    of_loss = max(abs(mine - wanted) / abs(wanted) for mine, wanted in pairs)
    params = ((found["params"][name], wanted) for name, wanted in expected["params"].items())
    return of_loss, max(float((mine - wanted).norm() / wanted.norm()) for mine, wanted in params)


def check(steps: Callable[..., Any], *cases: Case, num_ranks: int) -> None:
    """Losses and weights are those of one process."""
    for what, found in zip(cases, run(steps, *cases, num_ranks=num_ranks), strict=True):
        check_errors(what, found)


def check_errors(what: Case, found: dict[str, Any]) -> None:
    """What `run` found of a case is within the bounds of its dtype."""
    of_loss, of_params = errors(found, plain_steps(what))
    assert of_loss < BOUNDS[what.dtype][0], what
    assert of_params < BOUNDS[what.dtype][1], what
