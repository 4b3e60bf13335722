"""Adapters as a skeleton sees them: a frozen trunk, and low-rank products beside its linear segments. No torch.

full training    W, its gradient and moments; the gradient of W needs the segment's input
lora             A and B, their gradients and moments; the gradient of the input needs W only, so a segment without
                 an adapter needs no value at all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from headrace.storage.core.errors import InputError
from headrace.workers.model.config import ATTENTION, NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.model.skeleton import Kind, Segment, Skeleton, Workspace, dense_skeleton


def block_skeleton(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> Skeleton:
    """The block of a decoder, with the adapters of a run.

    Raises:
        InputError: the model has other layers than those with attention.
    """
    if any(name != ATTENTION for name in model.mixers):
        raise InputError(
            f"model.mixers={model.mixers}: the planner and FLOPs know {ATTENTION} only; choose that for all "
            "layers, or train in a program of your own, with preset_plan and apply_plan (workers/model/README.md)"
        )
    return adapted(dense_skeleton(model), adapter)


def adapted(skeleton: Skeleton, adapter: AdapterConfig) -> Skeleton:
    """Any skeleton with every parameter frozen and adapters on the linear segments that `adapter` names.

    One object for all adapters of the same shape, as the skeleton is for all models.
    """
    if not adapter.is_on:
        return skeleton
    return _adapted_skeleton(skeleton, adapter.rank, adapter.projections, adapter.dropout > 0)


def targets_of(segment: Segment, adapter: AdapterConfig) -> tuple[bool, ...]:
    """Whether there is an adapter, for each tensor that a linear segment makes."""
    return tuple(name in adapter.projections for name in segment.projections)


def num_adapter_params(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Elements of all adapters; 0 without."""
    return model.num_layers * sum(segment.adapted for segment in block_skeleton(model, adapter).segments)


@lru_cache(maxsize=64)
def _adapted_skeleton(skeleton: Skeleton, rank: int, projections: tuple[str, ...], drops: bool) -> Skeleton:
    widths = {name: spec.width for name, spec in skeleton.tensors.items()}
    segments = tuple(_adapted(segment, rank, projections, drops, widths) for segment in skeleton.segments)
    return replace(skeleton, segments=segments)


def _adapted(segment: Segment, rank: int, projections: tuple[str, ...], drops: bool, widths: dict[str, int]) -> Segment:
    if segment.kind is not Kind.linear:
        return replace(segment, frozen=True)
    width = widths[segment.reads[0]]
    outs = [widths[n] for n, leaf in zip(segment.made, segment.projections, strict=True) if leaf in projections]
    elements = rank * sum(width + out for out in outs)
    return replace(
        segment,
        frozen=True,
        adapted=elements,
        needs=segment.reads[:1] if outs else (),
        macs_per_token=segment.macs_per_token + elements,
        weights=segment.weights + elements,
        workspace=_workspace(rank, width, drops=drops) if outs else segment.workspace,
    )


def _workspace(rank: int, width: int, *, drops: bool) -> Callable[[int], Workspace]:
    def workspace(itemsize: int) -> Workspace:
        """x A^T and dy B, and with dropout the masked rows; a mask is drawn for few tokens at once."""
        narrow, masked = rank * itemsize, width * itemsize * drops
        return Workspace(masked + narrow, masked + 2 * narrow)

    return workspace
