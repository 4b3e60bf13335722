"""Models with mixers that scan, their plans under both sweeps, and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headrace.helpers.linear_attention import BY_AUTOGRAD, LINEAR_ATTENTION
from headrace.helpers.tiny_models import LLAMA
from headrace.kernels.api import Packing
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Stretch, Sweep, input_layer, keep_layer
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.config import ATTENTION
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import Reach, chunk_skeleton

MODEL = replace(LLAMA, num_heads=2, num_kv_heads=1, mixers=[LINEAR_ATTENTION, ATTENTION])
MODELS = {
    "scans": replace(MODEL, num_layers=2, mixers=[LINEAR_ATTENTION, BY_AUTOGRAD]),
    "hybrid": MODEL,
    "ends with attention": replace(MODEL, num_layers=2),
}
SEQ_LEN, TILE = 29, 4


def decoder(name: str, dtype: torch.dtype = torch.float64) -> Decoder:
    """A model of MODELS with random weights."""
    model = Decoder(MODELS[name], dtype=dtype)
    torch.manual_seed(0)
    for key, param in model.named_parameters():
        torch.nn.init.normal_(param, std=1.2 if "q_proj" in key or "k_proj" in key else 0.3)
    return model


def batch_of(batch_size: int = 2, *, packed: bool = False, seed: int = 0) -> TokenBatch:
    """Random tokens; every seventh target does not count. Documents of the rows end at different tokens."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (batch_size, SEQ_LEN), generator=draw)
    targets = tokens.roll(-1, 1)
    targets[:, ::7] = -100
    rows = ([11, 1, SEQ_LEN - 12], [8, SEQ_LEN - 8])
    lengths = [n for row in range(batch_size) for n in (rows[row % 2] if packed else [SEQ_LEN])]
    return TokenBatch(tokens, targets, Packing.of_lengths(lengths))


def oracle(model: Decoder, batches: list[TokenBatch]) -> list[torch.Tensor]:
    """Autograd over the plain modules: the recurrence token by token."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(batch.tokens, batch.targets, packing=batch.packing, loss_tile=16)
        (loss / sum(b.num_targets for b in batches)).backward()
        losses.append(loss.detach().double())
    return [*losses, *(param.grad.clone() for param in model.parameters() if param.grad is not None)]


def gradients(model: Decoder, plan: MemoryPlan, batches: list[TokenBatch], stack: Any = None) -> list[torch.Tensor]:
    """Losses of the micro-batches and the sum of their gradients under a plan."""
    model.zero_grad()
    handle = apply_plan(model, plan, stack, meter=None, bucket_plans=None)
    sweep = open_sweep(model, handle, None, loss_tile=16, itemsize=8)
    divisor = sum(batch.num_targets for batch in batches)
    try:
        losses = [sweep.forward_backward(b, divisor, step=0, micro_batch=i).double() for i, b in enumerate(batches)]
    finally:
        sweep.close()
    return [*losses, *(param.grad.clone() for param in model.parameters() if param.grad is not None)]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest relative error."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether all have the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows(*ends: tuple[int | None, Residence]) -> tuple[Stretch, ...]:
    """Stretches that end at these tokens."""
    begins = [0, *(end for end, _ in ends[:-1] if end is not None)]
    return tuple(Stretch(begin, end, place) for begin, (end, place) in zip(begins, ends, strict=True))


HBM, HOST, SSD, NONE = Residence.hbm, Residence.host, Residence.ssd, Residence.recompute


def by_layer(model: Decoder, name: str, tile: int = TILE) -> MemoryPlan:
    """A plan of the sweep by layer. front: the first tokens run again, of the others all leaves or stays."""
    layers = []
    for block in skeletons_of(model.blocks):
        tiled = [n for n in block.skeletal[1:] if block.maker[n].reach is not Reach.prefix]
        front = dict.fromkeys(tiled, rows((2 * tile, NONE), (5 * tile, HOST), (None, HBM)))
        layers.append(
            {
                "keep": keep_layer(block),
                "recompute": input_layer(block, HBM),
                "host": LayerPlan.of(**dict.fromkeys(block.skeletal, HOST)),
                "ssd": input_layer(block, SSD),
                "front": LayerPlan({**front, **input_layer(block, SSD).stretches}),
            }[name]
        )
    return MemoryPlan(name, tuple(layers), cuts=Cuts(tile))


BY_LAYER = ("keep", "recompute", "host", "ssd", "front")
PLACES = {
    "hbm": rows((None, HBM)),
    "host": rows((None, HOST)),
    "ssd": rows((None, SSD)),
    "mixed": rows((8, HBM), (16, HOST), (None, SSD)),
}


def by_chunk(model: Decoder, place: str = "hbm", chunks: tuple[int, ...] = (8,), *, again: bool = False) -> MemoryPlan:
    """A plan of the sweep by chunk; `again`: of a chunk only the inputs of its blocks stay."""
    skeletons = [chunk_skeleton(s) for s in skeletons_of(model.blocks)]
    layers = tuple(input_layer(s, HOST) if again else keep_layer(s) for s in skeletons)
    kv, cuts = PLACES[place], Cuts(TILE, None, chunks, 8)
    return MemoryPlan(place, layers, sweep=Sweep.by_chunk, cuts=cuts, kv=kv, kv_grads=kv)
