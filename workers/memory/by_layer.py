"""The sweep by layer as the engine calls it: one micro-batch forward and back, or forward alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from headrace.workers.memory.head_bytes import head_transient_bytes, tied_head_bytes
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.policy import MemoryHandle
from headrace.workers.model.skeleton import Span

OnLosses = Callable[[Span, torch.Tensor], None]

if TYPE_CHECKING:
    from headrace.workers.data.batch import TokenBatch
    from headrace.workers.model.decoder import Decoder


class ByLayer:
    """A layer handles the whole sequence before the next layer starts.

    Args:
        model: with the plan applied.
        handle: of that plan.
        meter: told what the loss takes while it runs; None counts nothing.
        loss_tile: tokens whose logits exist at once.
        itemsize: bytes of the compute dtype.
    """

    def __init__(
        self, model: Decoder, handle: MemoryHandle, meter: Meter | None, *, loss_tile: int, itemsize: int
    ) -> None:
        self._model, self._handle, self._meter = model, handle, meter
        self._loss_tile, self._itemsize = loss_tile, itemsize

    def forward_backward(
        self,
        batch: TokenBatch,
        divisor: float,
        *,
        step: int,
        micro_batch: int,
        seed: int = 0,
        row: int = 0,
        is_last: bool = True,
    ) -> torch.Tensor:
        """See Sweeping. The sum is fp32 (fp64 for an fp64 model)."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last)
        self._handle.begin(step, micro_batch, seed=seed, row=row)
        with self._meter or nullcontext():
            total = self._forward(batch)
            with head_counted(self._meter, self._model, batch.tokens.numel(), self._loss_tile, self._itemsize):
                (total / divisor).backward()
        self._handle.end()
        return total.detach()

    def evaluate(self, batch: TokenBatch, on_losses: OnLosses | None = None) -> torch.Tensor:
        """The sum of token losses. No gradient, no tier."""
        with torch.no_grad():
            found = self._forward(batch, each=on_losses is not None)
            if on_losses is None:
                return found
            on_losses((0, batch.seq_len), found)
            return found.sum(dtype=torch.float64)

    def facts(self) -> dict[str, str]:
        """See Sweeping."""
        return {}

    def close(self) -> None:
        """Drop what an unfinished pass left in the tiers and give the blocks their own forward back."""
        self._handle.remove()

    def _forward(self, batch: TokenBatch, *, each: bool = False) -> torch.Tensor:
        device = self._model.head_weight.device
        packing = replace(batch.packing, cu_seqlens=batch.packing.cu_seqlens.to(device, non_blocking=True))
        return self._model(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            packing=packing,
            loss_tile=self._loss_tile,
            each=each,
        )


@contextmanager
def head_counted(
    meter: Meter | None,
    model: Decoder,
    num_tokens: int,
    loss_tile: int,
    itemsize: int,
    *,
    beside: int = 0,
    has_lookup: bool = True,
) -> Iterator[None]:
    """Tell the meter what the loss took while it ran, and of a tied head what waits until backward is over.

    Autograd adds the gradients of a tied weight before it hands them over. On CUDA the allocator sees all of it.

    Args:
        beside: further bytes that are there while no block is at work.
        has_lookup: whether the rank has looked the tokens up, too.
    """
    config, hold = model.config, None
    vocab_size = -(-config.vocab_size // (1 if model.shards is None else model.shards.group.size()))
    is_trained = model.head_weight.requires_grad
    if meter is not None and model.head_weight.device.type != "cuda":
        num_bytes = head_transient_bytes(
            vocab_size,
            config.hidden_size,
            num_tokens=num_tokens,
            loss_tile=loss_tile,
            itemsize=itemsize,
            casts_products=True,
            is_frozen=not is_trained,
        )
        meter.reserve(num_bytes + beside).release()
        if config.tie_embeddings and is_trained and has_lookup:
            hold = meter.reserve(tied_head_bytes(vocab_size, config.hidden_size, itemsize))
    try:
        yield
    finally:
        if hold is not None:
            hold.release()
