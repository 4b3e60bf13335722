"""The sweep by layer as the engine calls it: one micro-batch forward and back, or forward alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headrace.workers.memory.footprint import head_transient_bytes, tied_head_bytes
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.policy import MemoryHandle

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
        self, batch: TokenBatch, divisor: float, *, step: int, micro_batch: int, seed: int = 0, row: int = 0
    ) -> torch.Tensor:
        """Add the gradients of sum of token losses / divisor to the parameters'.

        Args:
            seed / row: of random masks; see MemoryHandle.begin.

        Returns:
            The sum of token losses, not divided, detached: a scalar, fp32 (fp64 for an fp64 model).

        Raises:
            RuntimeError: tensors are left in the tiers because a backward did not run.
            DeviceBudgetExceeded, TransferFailed, TierFull: the step stops; the weights are as they were.
        """
        self._handle.begin(step, micro_batch, seed=seed, row=row)
        with self._meter or nullcontext():
            total = self._forward(batch)
            with self._head_counted(batch, total.device):
                (total / divisor).backward()
        self._handle.end()
        return total.detach()

    def evaluate(self, batch: TokenBatch) -> torch.Tensor:
        """The sum of token losses. No gradient, no tier."""
        with torch.no_grad():
            return self._forward(batch)

    def close(self) -> None:
        """Drop what an unfinished pass left in the tiers and give the blocks their own forward back."""
        self._handle.remove()

    def _forward(self, batch: TokenBatch) -> torch.Tensor:
        device = self._model.head_weight.device
        packing = replace(batch.packing, cu_seqlens=batch.packing.cu_seqlens.to(device, non_blocking=True))
        return self._model(
            batch.tokens.to(device, non_blocking=True),
            batch.targets.to(device, non_blocking=True),
            packing=packing,
            loss_tile=self._loss_tile,
        )

    @contextmanager
    def _head_counted(self, batch: TokenBatch, device: torch.device) -> Iterator[None]:
        """Tell the meter what the loss took while it ran, and of a tied head what waits until backward is over.

        Autograd adds the gradients of a tied weight before it hands them over. On CUDA the allocator sees all of it.
        """
        config, hold = self._model.config, None
        is_trained = self._model.head_weight.requires_grad
        if self._meter is not None and device.type != "cuda":
            num_bytes = head_transient_bytes(
                config.vocab_size,
                config.hidden_size,
                num_tokens=batch.tokens.numel(),
                loss_tile=self._loss_tile,
                itemsize=self._itemsize,
                casts_products=True,
                is_frozen=not is_trained,
            )
            self._meter.reserve(num_bytes).release()
            if config.tie_embeddings and is_trained:
                hold = self._meter.reserve(tied_head_bytes(config.vocab_size, config.hidden_size, self._itemsize))
        try:
            yield
        finally:
            if hold is not None:
                hold.release()
