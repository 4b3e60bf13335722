"""Loss and perplexity of a decoder on rows of any length: forward alone, chunk by chunk or layer by layer.

By chunk this is stage 1 of the sweep by chunk with the loss head. Where keys and values live on the host or on the SSD,
what is on the device depends on the chunk and not on the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.evaluate.positions import Bucket, PositionLosses
from headrace.workers.memory.chunk_plan import KvShape, pass_bytes
from headrace.workers.memory.chunk_sweep import OnChunk, no_chunk
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import ALL_HBM, MemoryPlan, Sweep
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.sweeps import Sweeping, apply_plan, open_sweep
from headrace.workers.model.adapter import block_skeletons
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import Skeleton, Span

OnRow = Callable[[int, Bucket], None]  # rows done, and the sums so far


def eval_plan(memory: MemoryPreset, skeletons: Sequence[Skeleton], seq_len: int, chunk_size: int) -> MemoryPlan:
    """The plan of a preset; a chunk is no longer than a row."""
    return preset_plan(memory, skeletons, choices=Choices(seq_len, chunk_size=min(chunk_size, seq_len)))


def on_device(plan: MemoryPlan, skeletons: Sequence[Skeleton]) -> MemoryPlan:
    """The plan for passes of which nothing leaves the device: by layer, and rows of one chunk. The same bits."""
    if plan.sweep is Sweep.by_chunk:
        return replace(plan, kv=ALL_HBM, kv_grads=ALL_HBM)
    return plan.keep_twin(skeletons)


def tier_bytes(
    plan: MemoryPlan, model: ModelConfig, *, batch_size: int, seq_len: int, itemsize: int
) -> dict[Medium, int]:
    """What keys and values of one pass fill of every tier, as in training; by layer nothing leaves the device."""
    if plan.sweep is not Sweep.by_chunk:
        return dict.fromkeys((Medium.host, Medium.ssd), 0)
    skeletons = block_skeletons(model)
    shape = KvShape.of(skeletons, batch_size=batch_size, num_tokens=seq_len, itemsize=itemsize)
    return pass_bytes(replace(plan, kv_grads=ALL_HBM), skeletons, shape).slots


def evaluate(
    model: Decoder,
    batches: Iterable[TokenBatch],
    plan: MemoryPlan,
    stack: TierStack | None,
    losses: PositionLosses,
    *,
    loss_tile: int = 1024,
    on_chunk: OnChunk = no_chunk,
    on_row: OnRow = lambda done, so_far: None,
) -> None:
    """Add the token losses of every batch to `losses`.

    Args:
        model: in evaluation mode, whole on one device.
        stack: needed where the plan moves keys and values.
        loss_tile: tokens whose logits exist at once.
        on_chunk: called when a chunk begins. on_row: after every batch.

    Raises:
        TransferFailed, TierFull: keys or values could not be stored or read.
    """
    handle = apply_plan(model, plan, stack, meter=None, bucket_plans=None)
    itemsize = model.head_weight.itemsize
    sweep = open_sweep(model, handle, None, loss_tile=loss_tile, itemsize=itemsize, on_chunk=on_chunk)
    with CleanUps() as closing:
        closing.callback(sweep.close)
        for done, batch in enumerate(batches, 1):
            sweep.evaluate(batch, functools.partial(_add, losses, batch))
            on_row(done, losses.whole())


def _add(losses: PositionLosses, batch: TokenBatch, span: Span, found: torch.Tensor) -> None:
    positions = batch.packing.positions(len(batch.tokens), batch.seq_len, torch.device("cpu"), span)
    losses.add(positions, batch.targets[:, slice(*span)], found)


def document_log_probs(sweep: Sweeping, batch: TokenBatch) -> torch.Tensor:
    """The log-probability of the targets of every document of a batch, (number of documents,) fp64 on the CPU.

    Of a response it is that of all its tokens behind its prompt; a prompt has no target, and 0. Documents are in the
    order of `batch.packing`.
    """
    documents = batch.packing.documents(len(batch.tokens), batch.seq_len)
    sums = torch.zeros(len(batch.packing.lengths), dtype=torch.float64)

    def add(span: Span, losses: torch.Tensor) -> None:
        sums.index_add_(0, documents[:, slice(*span)].flatten(), -losses.double().cpu().flatten())

    sweep.evaluate(batch, add)
    return sums
