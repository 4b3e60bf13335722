"""Attention on tokens that ranks share, as rules of a block's program: Ulysses (arXiv 2309.14509) around the ring.

An exchanged tensor (B, n, u * t * w) holds in row i token i of each of the u Ulysses ranks times t tensor ranks, w
elements of each: this rank's share of the heads. Attention takes it in the order of the tokens, rank after rank,
(B, u * t * n, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from headrace.kernels.attention import AttentionSpec, attention_backward, attention_forward
from headrace.workers.model.exchanged import EXCHANGE, EXCHANGE_V, HOME, mix_of
from headrace.workers.model.program import (
    Gradients,
    Made,
    MixRule,
    OutAndLse,
    Pieces,
    PointwiseRule,
    Program,
    Rule,
    Shared,
    Tensors,
    by_spans,
)
from headrace.workers.model.segments import Segment, Skeleton, Span
from headrace.workers.model.tensor_cut import shared as shared_skeleton
from headrace.workers.model.tensor_cut import tensor_cut
from headrace.workers.parallel.collectives import Traffic, all_to_all
from headrace.workers.parallel.context import SplitPacking
from headrace.workers.parallel.dims import Axis
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.ring import Ring
from headrace.workers.parallel.tensor import TensorGroup, run_program


@dataclass(frozen=True)
class ContextGroup:
    """This rank among those that share its rows.

    Args:
        ulysses: their number; `group` is theirs, None for one.
        ring: the rank's ring; None: there is none.
        tensor: those that share its weights, too; None: there are none.
    """

    ulysses: int
    group: dist.ProcessGroup | None
    ring: Ring | None
    traffic: Traffic
    tensor: TensorGroup | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that share a row."""
        return self.in_row * (1 if self.ring is None else self.ring.size)

    @property
    def degrees(self) -> dict[str, int]:
        """By axis."""
        return {"tensor": self.num_tensor, "ulysses": self.ulysses, "ring": 1 if self.ring is None else self.ring.size}

    @property
    def in_row(self) -> int:
        """Tokens side by side in a row of attention's tensors."""
        return self.ulysses * self.num_tensor

    @property
    def num_tensor(self) -> int:
        """Tensor ranks."""
        return 1 if self.tensor is None else self.tensor.size

    @classmethod
    def of(cls, meshes: Meshes, traffic: Traffic) -> ContextGroup | None:
        """This rank's; None where no rank shares its rows."""
        ulysses, around = meshes.group(Axis.ulysses), meshes.group(Axis.ring)
        tensor = TensorGroup.of(meshes, traffic)
        if ulysses is None and around is None and tensor is None:
            return None
        ring = None if around is None else Ring(around.rank(), around.size(), around, traffic)
        return cls(1 if ulysses is None else ulysses.size(), ulysses, ring, traffic, tensor)

    def exchange(self, tensors: Sequence[torch.Tensor], *, to_heads: bool) -> Made:
        """Own tokens with all heads become all ranks' tokens with a share of the heads, and the other way round.

        Args:
            tensors: to_heads: (B, n, t * u * w) each, w of their own, t tensor ranks; else (B, n, u * t * w).

        Returns:
            (B, n, u * t * w), or (B, n, t * u * w); contiguous.
        """
        assert self.group is not None
        inner = (self.num_tensor, self.ulysses) if to_heads else (self.ulysses, self.num_tensor)
        cut = [tensor.unflatten(2, (*inner, -1)) for tensor in tensors]
        widths = [tensor.shape[4] for tensor in cut]
        parts = torch.cat(cut, dim=4).movedim(3 if to_heads else 2, 0).contiguous()
        received = all_to_all(parts, self.group, self.traffic).movedim(0, 2 if to_heads else 3)
        return tuple(part.flatten(2).contiguous() for part in received.split(widths, dim=4))

    def in_order(self, tensor: torch.Tensor, width: int) -> torch.Tensor:
        """(B, n, m * w) to (B, m * n, w / width, width): the tokens of rank 0, then those of rank 1, ..."""
        if self.in_row == 1:
            return tensor.unflatten(2, (-1, width))
        by_rank = tensor.unflatten(2, (self.in_row, -1, width)).permute(0, 2, 1, 3, 4)
        return by_rank.flatten(1, 2)

    def in_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way round, contiguous."""
        if self.in_row == 1:
            return tensor.flatten(2)
        return tensor.unflatten(1, (self.in_row, -1)).permute(0, 2, 1, 3, 4).flatten(2)


@dataclass(frozen=True)
class SharedMixRule(MixRule):
    """Attention of a rank's share of heads on the tokens of its Ulysses and tensor ranks."""

    context: ContextGroup = field(kw_only=True)

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """See Rule. q: rows of the span; k, v: all rows."""
        q, k, v = (self.heads(values[name]) for name in self.segment.reads)

        def attend(own: torch.Tensor, first: int) -> OutAndLse:
            return attention_forward(own, k, v, self.spec(own, k.shape[1], first, shared))

        return self.made(*by_spans(q, self.query_spans(span, k.shape[1]), attend))

    def backward(self, values: Tensors, grad: torch.Tensor, shared: Shared) -> Tensors:
        """dq, dk, dv of all rows, by the names of q, k and v."""
        names, (out_name, lse_name) = self.segment.reads, self.segment.made
        q, k, v, out, dout = (self.heads(tensor) for tensor in (*(values[n] for n in (*names, out_name)), grad))
        grads = self._gradients((dout, q, k, v, out), self.lse(values[lse_name]), shared)
        return {name: self.rows(part) for name, part in zip(names, grads, strict=True)}

    def _gradients(self, tensors: Sequence[torch.Tensor], lse: torch.Tensor, shared: Shared) -> Sequence[torch.Tensor]:
        """dq, dk, dv from dout, q, k, v and out."""
        dout, q, k, v, out = tensors
        return attention_backward(dout, q, k, v, out, lse, self.spec(q, k.shape[1], 0, shared))

    def heads(self, tensor: torch.Tensor, width: int | None = None) -> torch.Tensor:
        """(B, n, m * H * D), m tokens in a row, as (B, m * n, H, D)."""
        return self.context.in_order(tensor, width or self.head_size)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        return self.context.in_rows(tensor)

    def query_spans(self, span: Span, num_tokens: int) -> Sequence[Span]:
        """See MixRule."""
        rows = num_tokens // self.context.in_row
        if span == (0, rows):
            return [(0, num_tokens)]
        return [(rank * rows + span[0], rank * rows + span[1]) for rank in range(self.context.in_row)]


@dataclass(frozen=True)
class RingMixRule(SharedMixRule):
    """The same over the tokens of the whole ring."""

    def run(self, params: Mapping[str, torch.Tensor], values: Tensors, span: Span, shared: Shared) -> Tensors:
        """See Rule. q: rows of the span; k, v: all rows."""
        q, k, v = (self.heads(values[name]) for name in self.segment.reads)
        ring, spec, packing = self._ring(q, shared)
        out, lse = ring.forward(q, k, v, self.query_spans(span, k.shape[1]), spec, packing)
        return self.made(out, lse)

    def _gradients(self, tensors: Sequence[torch.Tensor], lse: torch.Tensor, shared: Shared) -> Sequence[torch.Tensor]:
        ring, spec, packing = self._ring(tensors[1], shared)
        return ring.backward(tensors, lse, spec, packing)

    def _ring(self, q: torch.Tensor, shared: Shared) -> tuple[Ring, AttentionSpec, SplitPacking]:
        packing = shared.packing
        assert isinstance(packing, SplitPacking), "a context group computes on batches that its token index has split"
        assert self.context.ring is not None
        return self.context.ring, self.spec(q, packing.seq_len, 0, shared), packing


def shared_program(program: Program, context: ContextGroup) -> Program:
    """A block's program whose attention sees the tokens of the whole context group.

    Raises:
        InputError: a block without attention.
    """
    mix, tensor = mix_of(program.skeleton), context.tensor
    base = program.rule_of[mix]
    assert isinstance(base, MixRule)
    ring = 1 if context.ring is None else context.ring.size
    skeleton = shared_skeleton(program.skeleton, tensor=context.num_tensor, ulysses=context.ulysses, ring=ring)
    rules = {rule.segment.name: rule for rule in program.rules}
    head_size = base.head_size

    def rule_of(segment: Segment) -> Rule:
        if segment.key_heads:
            kind = SharedMixRule if context.ring is None else RingMixRule
            return kind(segment, base.head_size, base.spec, base.window, context=context)
        if segment.name in (EXCHANGE, EXCHANGE_V, HOME):
            return _exchange_rule(segment, tensor_cut(program.skeleton, context.num_tensor), context, head_size)
        if segment.gathered:
            assert tensor is not None
            return tensor.rule(segment)
        return replace(rules[segment.name], segment=segment)  # type: ignore[type-var]

    own_part = None if tensor is None else tensor.own_part
    return Program(skeleton, tuple(rule_of(segment) for segment in skeleton.segments), own_part)


def _exchange_rule(segment: Segment, whole: Skeleton, context: ContextGroup, head_size: int) -> PointwiseRule:
    """Every tensor that has fewer heads than there are ranks is replicated on the way, its gradients are added up."""
    if segment.name == HOME:
        copies = [1]
    else:
        copies = [made.width // whole.tensors[made.name].width for made in segment.makes]
    to_heads = segment.name != HOME

    def run(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
        wide = [replicated(x, count, head_size) for x, count in zip(reads, copies, strict=True)]
        return context.exchange(wide, to_heads=to_heads)

    def back(values: Pieces, params: Pieces, grads: Pieces, at: tuple[Span, Shared], trained: bool) -> Gradients:
        own = context.exchange(grads, to_heads=not to_heads)
        return tuple(added_up(x, count, head_size) for x, count in zip(own, copies, strict=True)), ()

    return PointwiseRule(segment, (), run, back)


def replicated(tensor: torch.Tensor, copies: int, head_size: int) -> torch.Tensor:
    """(B, n, heads * D) to (B, n, heads * copies * D), every head so often in turn."""
    if copies == 1:
        return tensor
    return tensor.unflatten(2, (-1, 1, head_size)).expand(-1, -1, -1, copies, -1).flatten(2)


def added_up(tensor: torch.Tensor, copies: int, head_size: int) -> torch.Tensor:
    """The gradient of `replicated`: summed over the copies in fp32 (fp64 for fp64)."""
    if copies == 1:
        return tensor
    wide = torch.float64 if tensor.dtype is torch.float64 else torch.float32
    total = tensor.unflatten(2, (-1, copies, head_size)).sum(3, dtype=wide)
    return total.flatten(2).to(tensor.dtype)


def share_blocks(blocks: Sequence[nn.Module], context: ContextGroup) -> None:
    """Make every block the context group's: its program, and its forward without a plan. In place; before a plan.

    Raises:
        InputError: a block without attention.
    """
    for block in blocks:
        run_program(block, shared_program(cast(Program, block.program), context))
