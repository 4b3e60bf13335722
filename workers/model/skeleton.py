"""A block as a short program over named tensors: what the planner prices and what the sweeps run. No torch.

The parts are those of segments.py.

The dense decoder block:

    segment   kind        reads          makes
    norm1     pointwise   x              n1             and scale1, 1 / rms(x), for its gradient
    qkv       linear      n1             q_in k_in v      q k v where heads have no norm of their own
    rope      pointwise   q_in k_in      q k
    mix       mix         q k v          out lse
    o         linear      out, x         residual         x is added to the product
    norm2     pointwise   residual       n2             and scale2
    gate_up   linear      n2             gate up
    act       pointwise   gate up        act
    down      linear      act, residual  y                residual is added to the product
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from headrace.workers.model.config import ATTENTION, ModelConfig
from headrace.workers.model.mixers.registry import mixer_named
from headrace.workers.model.segments import (
    ROOT,
    DenseShape,
    Kind,
    Reach,
    Segment,
    Skeleton,
    Span,
    TensorSpec,
    Workspace,
)

__all__ = [
    "ROOT",
    "DenseShape",
    "Kind",
    "Reach",
    "Segment",
    "Skeleton",
    "Span",
    "TensorSpec",
    "Workspace",
    "attention_part",
    "chunk_skeleton",
    "dense_skeleton",
    "norm_skeleton",
    "opaque_skeleton",
]


def dense_skeleton(model: ModelConfig, mixer: str = ATTENTION) -> Skeleton:
    """The block of a Llama, Qwen2, Qwen3 or Mistral decoder; one object for all models of the same shape.

    Args:
        mixer: how the tokens of the layer see each other; see mixers/registry.py.
    """
    return _dense_skeleton(DenseShape(*(getattr(model, name) for name in DenseShape._fields)), mixer)


@lru_cache(maxsize=64)
def _dense_skeleton(shape: DenseShape, mixer: str) -> Skeleton:
    part = mixer_named(mixer).part(shape)
    segments = (_first_norm(shape), *part.segments, *_mlp_part(shape))
    return Skeleton(TensorSpec(ROOT, shape.hidden_size), segments, (ROOT, *part.skeletal, "residual", "gate", "up"))


def _first_norm(shape: DenseShape) -> Segment:
    return Segment(
        name="norm1",
        kind=Kind.pointwise,
        reads=(ROOT,),
        makes=(TensorSpec("n1", shape.hidden_size), _scale("scale1")),
        needs=(ROOT, "scale1"),
        weights=shape.hidden_size,
        workspace=_norm_workspace(shape.hidden_size),
    )


def attention_part(shape: DenseShape) -> tuple[Segment, ...]:
    """Projections, rotation, attention, and the projection of its output."""
    hidden, q_width, kv_width = shape.hidden_size, shape.q_width, shape.kv_width
    # A rotation needs no value for its gradient; the norm of the heads before it does.
    before = ("q_in", "k_in")
    return (
        Segment(
            name="qkv",
            kind=Kind.linear,
            reads=("n1",),
            makes=(TensorSpec("q_in", q_width), TensorSpec("k_in", kv_width), TensorSpec("v", kv_width)),
            needs=("n1",),
            macs_per_token=hidden * (q_width + 2 * kv_width),
            weights=(hidden + shape.qkv_bias) * (q_width + 2 * kv_width),
            projections=("q_proj", "k_proj", "v_proj"),
        ),
        Segment(
            name="rope",
            kind=Kind.pointwise,
            reads=before,
            makes=(TensorSpec("q", q_width), TensorSpec("k", kv_width)),
            needs=before if shape.qk_norm else (),
            weights=2 * shape.head_size if shape.qk_norm else 0,
            workspace=_rope_workspace(shape),
        ),
        Segment(
            name="mix",
            kind=Kind.mix,
            reach=Reach.prefix,
            reads=("q", "k", "v"),
            earlier=("k", "v"),
            makes=(TensorSpec("out", q_width), TensorSpec("lse", shape.num_heads, least_itemsize=4, is_aside=True)),
            needs=("q", "k", "v", "out", "lse"),
            macs_per_pair=2 * q_width,
            key_heads=shape.num_kv_heads,
            # The LSE in the layout of the operator, beside the contiguous one.
            workspace=lambda itemsize: Workspace(run=shape.num_heads * max(itemsize, 4)),
        ),
        Segment(
            name="o",
            kind=Kind.linear,
            reads=("out", ROOT),
            adds=ROOT,
            makes=(TensorSpec("residual", hidden),),
            needs=("out",),
            macs_per_token=q_width * hidden,
            weights=q_width * hidden,
            projections=("o_proj",),
        ),
    )


def _mlp_part(shape: DenseShape) -> tuple[Segment, ...]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return (
        Segment(
            name="norm2",
            kind=Kind.pointwise,
            reads=("residual",),
            makes=(TensorSpec("n2", hidden), _scale("scale2")),
            needs=("residual", "scale2"),
            weights=hidden,
            workspace=_norm_workspace(hidden),
        ),
        Segment(
            name="gate_up",
            kind=Kind.linear,
            reads=("n2",),
            makes=(TensorSpec("gate", inner), TensorSpec("up", inner)),
            needs=("n2",),
            macs_per_token=2 * hidden * inner,
            weights=2 * hidden * inner,
            projections=("gate_proj", "up_proj"),
        ),
        Segment(
            name="act",
            kind=Kind.pointwise,
            reads=("gate", "up"),
            makes=(TensorSpec("act", inner),),
            needs=("gate", "up"),
            workspace=lambda itemsize: Workspace(run=inner * itemsize),
        ),
        Segment(
            name="down",
            kind=Kind.linear,
            reads=("act", "residual"),
            adds="residual",
            makes=(TensorSpec("y", hidden),),
            needs=("act",),
            macs_per_token=inner * hidden,
            weights=inner * hidden,
            projections=("down_proj",),
        ),
    )


def _scale(name: str) -> TensorSpec:
    return TensorSpec(name, 1, least_itemsize=4, is_aside=True)


def _norm_workspace(width: int, *, has_scale: bool = True) -> Callable[[int], Workspace]:
    """`has_scale`: the scale is a tensor of the block, which is made before the gradient is taken."""

    def workspace(itemsize: int) -> Workspace:
        wide, scale = 0 if itemsize >= 4 else 4 * width, max(itemsize, 4)  # `wide`: the copy that is computed with
        own = scale if has_scale else 0
        return Workspace(4 * width + wide + scale - own, _norm_grad(width, 1, itemsize) - own)

    return workspace


def _norm_grad(width: int, num_heads: int, itemsize: int) -> int:
    """Beside dx: the scale and the correction of every head, and in a narrow dtype x and dx in fp32."""
    return 2 * num_heads * max(itemsize, 4) + (0 if itemsize >= 4 else 8 * width)


def _rope_workspace(shape: DenseShape) -> Callable[[int], Workspace]:
    both, heads = shape.q_width + shape.kv_width, shape.num_heads + shape.num_kv_heads

    def workspace(itemsize: int) -> Workspace:
        if not shape.qk_norm:
            return Workspace(both * itemsize, (both + shape.head_size) * itemsize)
        # In a narrow dtype each norm has its input and its result in fp32, beside the result; q's is there for k's.
        of_q = (8 + itemsize) * shape.q_width + 4 * shape.num_heads
        of_k = itemsize * shape.q_width + (8 + itemsize) * shape.kv_width + 4 * shape.num_kv_heads
        run = max(2 * both * itemsize, max(of_q, of_k) - both * itemsize if itemsize < 4 else 0)
        # The gradients rotated back; those of q are there before those of k.
        return Workspace(run, (both + shape.head_size) * itemsize + _norm_grad(shape.kv_width, heads, itemsize))

    return workspace


@lru_cache(maxsize=64)
def norm_skeleton(width: int) -> Skeleton:
    """The final norm, a block of one segment."""
    norm = Segment(
        name="norm",
        kind=Kind.pointwise,
        reads=(ROOT,),
        makes=(TensorSpec("y", width),),
        needs=(ROOT,),
        weights=width,
        workspace=_norm_workspace(width, has_scale=False),
    )
    return Skeleton(TensorSpec(ROOT, width), (norm,), (ROOT,))


@lru_cache(maxsize=64)
def chunk_skeleton(skeleton: Skeleton) -> Skeleton:
    """What a block keeps of a chunk: as of whole rows, but keys and values are in the KV blocks."""
    segments = tuple(_on_chunk(segment) if segment.earlier else segment for segment in skeleton.segments)
    wanted = {name for segment in segments for name in segment.needs}
    received = {name for segment in segments for name in segment.receives}
    skeletal = tuple(name for name in skeleton.skeletal if name in wanted or name not in received)
    return Skeleton(skeleton.root, segments, skeletal)


def _on_chunk(segment: Segment) -> Segment:
    reads, needs = (tuple(n for n in names if n not in segment.earlier) for names in (segment.reads, segment.needs))
    return replace(segment, reads=reads, needs=needs, earlier=(), receives=segment.earlier)


def opaque_skeleton(width: int = 0) -> Skeleton:
    """A foreign block: one segment that reads x and saves what autograd wants, or is run again from x.

    Args:
        width: elements per token of its input; 0 where nobody asks for bytes.
    """
    made = (TensorSpec("saved", 0), TensorSpec("y", width))
    whole = Segment(name="all", kind=Kind.opaque, reads=(ROOT,), makes=made, needs=("saved",))
    return Skeleton(TensorSpec(ROOT, width), (whole,), (ROOT, "saved"))
