"""Adapters as a skeleton sees them: a frozen trunk, and low-rank products beside its linear segments. No torch.

full training    W, its gradient and moments; the gradient of W needs the segment's input
lora             A and B, their gradients and moments; the gradient of the input needs W only, so a segment without
                 an adapter needs no value at all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.model.skeleton import Kind, Segment, Skeleton, Workspace, dense_skeleton


def block_skeleton(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER, layer: int = 0) -> Skeleton:
    """One block of a decoder, with the adapters of a run."""
    return adapted(dense_skeleton(model, model.mixer_of(layer)), adapter)


def block_skeletons(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> list[Skeleton]:
    """All blocks of a decoder; those that are alike are one object."""
    kinds = {model.mixer_of(layer): block_skeleton(model, adapter, layer) for layer in range(len(model.mixers))}
    return [kinds[model.mixer_of(layer)] for layer in range(model.num_layers)]


def num_params(model: ModelConfig) -> int:
    """Parameters of a decoder, whatever its layers are; tied embeddings count once."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings + model.hidden_size + sum(num * weights_of(skeleton) for skeleton, num in _counted(model))


def _counted(model: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> Iterator[tuple[Skeleton, int]]:
    """The blocks of the pattern of mixers, and how many of the layers are like each: a file may claim any number."""
    period = len(model.mixers)
    for layer in range(period):
        yield block_skeleton(model, adapter, layer), -((layer - model.num_layers) // period)


def weights_of(skeleton: Skeleton) -> int:
    """Parameters of a block."""
    return sum(segment.weights for segment in skeleton.segments)


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
    if not adapter.is_on:
        return 0
    return sum(num * s.adapted for skeleton, num in _counted(model, adapter) for s in skeleton.segments)


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
