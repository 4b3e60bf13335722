"""A block whose weights tensor ranks share, and its tokens between them (Korthikanti et al. 2022, arXiv 2205.05198).

    norm1  gather  qkv rope mix o  scatter  norm2  gather  gate_up act down  scatter
    n1     n1_all  own heads       residual n2     n2_all  own columns       y

Outside of gather and scatter a rank has its own tokens with all elements. Between them row i holds token i of every
tensor rank side by side, each with this rank's share of the heads or columns: the gather needs a rank's own tokens i
only, so it runs on any tile of tokens, and a row is as wide as without tensor ranks. With fewer KV heads than ranks,
several ranks have the same head, each beside queries of its own: k and v are wider then. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

from headrace.workers.model.config import ModelConfig
from headrace.workers.model.exchanged import exchanged, mix_of
from headrace.workers.model.segments import Kind, Segment, Skeleton, TensorSpec, Workspace


def degree_problems(tensor: int, ulysses: int, model: ModelConfig) -> Iterator[str]:
    """What keeps a model from being cut into so many parts, in words; nothing where it can be."""
    if tensor > 1 and (wrong := _undivided(tensor, model)):
        most = math.gcd(model.num_heads, model.intermediate_size)
        usable = ", ".join(str(number) for number in range(1, most + 1) if not _undivided(number, model))
        yield f"parallel.tensor={tensor}: does not divide {', '.join(wrong)}; use one of {usable}"
    if tensor > 1 and ulysses > 1 and model.num_heads % (tensor * ulysses):
        yield (
            f"parallel.tensor={tensor} x parallel.ulysses={ulysses}: {tensor * ulysses} does not divide "
            f"model.num_heads={model.num_heads}; lower one of them"
        )
    if model.vocab_size and -(-model.vocab_size // max(1, tensor)) * (tensor - 1) >= model.vocab_size:
        yield f"parallel.tensor={tensor}: model.vocab_size={model.vocab_size} leaves the last rank no row; lower it"


def _undivided(tensor: int, model: ModelConfig) -> list[str]:
    """Sizes of a model that so many ranks cannot share. Beyond the KV heads, whole numbers of ranks share one."""
    names = [name for name in ("num_heads", "intermediate_size") if getattr(model, name) % tensor]
    copies, left = divmod(tensor, model.num_kv_heads)
    if model.num_kv_heads % tensor and (left or model.head_size % copies):
        names.insert(1, "num_kv_heads")
    return [f"model.{name}={getattr(model, name)}" for name in names]


def shared(skeleton: Skeleton, *, tensor: int = 1, ulysses: int = 1, ring: int = 1) -> Skeleton:
    """The skeleton of a block as one of the ranks runs it that share its weights or its tokens.

    Raises:
        InputError: a block without attention.
    """
    return exchanged(tensor_cut(skeleton, tensor), ulysses, ring)


@lru_cache(maxsize=64)
def tensor_cut(skeleton: Skeleton, degree: int) -> Skeleton:
    """See the module. A linear segment that adds to its product is row-parallel, every other one column-parallel.

    Raises:
        InputError: a block without attention.
    """
    if degree == 1:
        return skeleton
    skeleton = _with_copies(skeleton, degree // mix_of(skeleton).key_heads)
    tensors, segments, between = skeleton.tensors, list[Segment](), set[str]()
    for segment in skeleton.segments:
        if segment.kind is Kind.linear and segment.adds is not None:
            segments += _row_parallel(segment, tensors[segment.made[0]], degree)
            continue
        if segment.kind is Kind.linear:
            segments += _column_parallel(segment, tensors[segment.reads[0]], degree)
        elif between.isdisjoint(segment.reads):
            segments.append(segment)
            continue
        else:
            segments.append(replace(segment, tokens_per_row=degree, key_heads=segment.key_heads // degree))
        between.update(segment.made)
    return replace(skeleton, segments=tuple(segments))


def _with_copies(skeleton: Skeleton, copies: int) -> Skeleton:
    """With so many of every KV head."""
    if copies <= 1:
        return skeleton
    mix = mix_of(skeleton)
    wide, segments = set(mix.reads[1:]), list[Segment]()
    for segment in reversed(skeleton.segments):
        if segment.kind is Kind.pointwise:  # a rotation makes them of others that are as wide
            wide.update(name for name, made in zip(segment.reads, segment.made, strict=False) if made in wide)
        if wide.isdisjoint(segment.made):
            segments.append(segment)
            continue
        before = sum(tensor.width for tensor in segment.makes)
        makes = tuple(replace(t, width=copies * t.width) if t.name in wide else t for t in segment.makes)
        added = sum(tensor.width for tensor in makes) - before
        segment = replace(segment, makes=makes, workspace=_scaled(segment.workspace, (before + added) / before))
        if segment.kind is Kind.linear:
            weights = segment.weights + added * ((segment.weights - segment.adapted) // before)
            macs = segment.macs_per_token + added * skeleton.tensors[segment.reads[0]].width
            segment = replace(segment, weights=weights, macs_per_token=macs)
        segments.append(segment)
    found = replace(skeleton, segments=tuple(reversed(segments)))
    at = found.segments.index(mix)
    own = replace(mix, key_heads=copies * mix.key_heads)
    return replace(found, segments=(*found.segments[:at], own, *found.segments[at + 1 :]))


def _scaled(workspace: Callable[[int], Workspace], factor: float) -> Callable[[int], Workspace]:
    def scaled(itemsize: int) -> Workspace:
        plain = workspace(itemsize)
        return Workspace(math.ceil(factor * plain.run), math.ceil(factor * plain.grad))

    return scaled


def _column_parallel(segment: Segment, given: TensorSpec, degree: int) -> list[Segment]:
    """Every rank makes its columns of all ranks' tokens."""
    whole = TensorSpec(f"{given.name}_all", degree * given.width)
    gather = Segment(
        name=f"gather_{given.name}",
        kind=Kind.pointwise,
        reads=(given.name,),
        makes=(whole,),
        needs=(),
        gathered=given.width,
        workspace=_workspace(given.width, degree),
    )
    needs = tuple(whole.name if name == given.name else name for name in segment.needs)
    return [gather, _local(replace(segment, reads=(whole.name, *segment.reads[1:]), needs=needs), degree)]


def _row_parallel(segment: Segment, made: TensorSpec, degree: int) -> list[Segment]:
    """Every rank makes its part of the sum for all ranks' tokens."""
    assert segment.adds is not None
    part = TensorSpec(f"{made.name}_part", degree * made.width)
    reads = tuple(name for name in segment.reads if name != segment.adds)
    scatter = Segment(
        name=f"scatter_{made.name}",
        kind=Kind.pointwise,
        reads=(part.name, segment.adds),
        adds=segment.adds,
        makes=(made,),
        needs=(),
        gathered=made.width,
        workspace=_workspace(made.width, degree),
    )
    return [_local(replace(segment, reads=reads, adds=None, makes=(part,)), degree), scatter]


def _local(segment: Segment, degree: int) -> Segment:
    """With a rank's share of the weights; adapters, of which one half is whole on every rank, are counted whole."""
    weights = (segment.weights - segment.adapted) // degree + segment.adapted
    return replace(segment, weights=weights, tokens_per_row=degree)


def _workspace(width: int, degree: int) -> Callable[[int], Workspace]:
    def workspace(itemsize: int) -> Workspace:
        # What all ranks have sent, or what is sent to all, before it stands in rows.
        return Workspace(degree * width * itemsize, degree * width * itemsize)

    return workspace
