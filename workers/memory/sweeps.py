"""Which sweep carries out a plan: applied to a model's blocks, and as the engine calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from headrace.workers.memory.by_layer import ByLayer, OnLosses
from headrace.workers.memory.chunk_record import PassRecords
from headrace.workers.memory.chunk_sweep import ByChunk, ChunkHandle, OnChunk, apply_chunks, no_chunk
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.plan import MemoryPlan, Sweep
from headrace.workers.memory.policy import MemoryHandle, apply_memory

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack
    from headrace.workers.data.batch import TokenBatch
    from headrace.workers.model.decoder import Decoder


class Sweeping(Protocol):
    """One micro-batch at a time."""

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
        """Add the gradients of sum of token losses / divisor to the parameters'.

        Args:
            seed / row: of random masks; see MemoryHandle.begin.
            is_last: no micro-batch of the step follows: gradients are reduced over the ranks.

        Returns:
            The sum of token losses, not divided, detached: a scalar.

        Raises:
            RuntimeError: tensors are left in the tiers because a backward did not run.
            DeviceBudgetExceeded, TransferFailed, TierFull: the step stops; the weights are as they were.
        """

    def evaluate(self, batch: TokenBatch, on_losses: OnLosses | None = None) -> torch.Tensor:
        """The sum of token losses, without a gradient.

        Args:
            on_losses: called with spans of the rows, one after another, and the losses of their tokens, (B, n).
        """

    def facts(self) -> dict[str, str]:
        """How it ran, for the run's record."""

    def close(self) -> None:
        """Drop what an unfinished pass left in the tiers and give the blocks their own forward back."""


def apply_plan(
    model: nn.Module,
    plan: MemoryPlan,
    stack: TierStack | None,
    *,
    meter: Meter | None,
    bucket_plans: Mapping[int, MemoryPlan] | None,
    layers: Sequence[int] | None = None,
) -> MemoryHandle:
    """Make the blocks and the final norm of a decoder obey a plan. Arguments and errors as apply_memory."""
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    norm: nn.Module | None = getattr(model, "norm", None)  # only the last stage of a pipeline has it
    if plan.sweep is Sweep.by_chunk:
        assert norm is not None, "a pipeline has plans by layer"
        return apply_chunks(list(blocks), plan, stack, meter=meter, norm=norm, bucket_plans=bucket_plans)
    return apply_memory(list(blocks), plan, stack, meter=meter, norm=norm, bucket_plans=bucket_plans, layers=layers)


def open_sweep(
    model: Decoder,
    handle: MemoryHandle,
    meter: Meter | None,
    *,
    loss_tile: int,
    itemsize: int,
    on_chunk: OnChunk = no_chunk,
    records: PassRecords | None = None,
) -> Sweeping:
    """The sweep of the handle's plan. Arguments as ByLayer and ByChunk."""
    if isinstance(handle, ChunkHandle):
        return ByChunk(model, handle, meter, loss_tile=loss_tile, itemsize=itemsize, on_chunk=on_chunk, records=records)
    return ByLayer(model, handle, meter, loss_tile=loss_tile, itemsize=itemsize)
