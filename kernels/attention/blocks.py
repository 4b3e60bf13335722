"""Causal attention of a query chunk over keys and values that arrive in blocks; exact backward, block by block.

Forward merges the (out, LSE) of every block into fp32 accumulators; backward gives every block the final out and LSE,
so blocks are independent of each other: each may come from another tier and be let go at once. The order of blocks and
pieces is fixed by the cut: where blocks are stored changes no bit.

Key heads are not copied for grouped queries: where no mask is needed, the queries of a group stand one below the other,
(B, Hkv, group * T, D) against (B, Hkv, S, D), and the operator sums dK and dV over the group in its own accumulators.
On the diagonal the operator's own grouping takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.kernels.attention.cut import Piece, PieceKind, Span
from headrace.kernels.attention.operators import BlockOperator, block_operator, piece_operator
from headrace.kernels.attention.spec import AttentionSpec
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.merge import merge_

Block = tuple[torch.Tensor, torch.Tensor]
# sink(index, dk, dv): gradients (B, S_block, Hkv, D) of a block, fp32 (fp64 for fp64), its own to keep.
GradientSink = Callable[[int, torch.Tensor, torch.Tensor], None]


class BlockSource(Protocol):
    """Where keys and values come from: the device, pinned host memory, a drive."""

    def fetch(self, order: Sequence[int]) -> Iterator[Block]:
        """k, v (B, S_block, Hkv, D) of these blocks on the device of the queries, one after another.

        The whole order is known at the start, for prefetch. Asking for the next block says that the one before has been
        read by everything queued on the current stream; it is kept until the next one has come.
        """


@dataclass(frozen=True)
class ResidentBlocks:
    """Blocks that are views of whole tensors.

    Args:
        k, v: (B, S, Hkv, D). bounds: of the blocks, see `block_bounds`.
    """

    k: torch.Tensor
    v: torch.Tensor
    bounds: tuple[Span, ...]

    def fetch(self, order: Sequence[int]) -> Iterator[Block]:
        """See BlockSource."""
        for index in order:
            begin, end = self.bounds[index]
            yield self.k[:, begin:end], self.v[:, begin:end]


@torch.no_grad()
def attention_forward_blocks(
    q: torch.Tensor, blocks: BlockSource, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of T tokens over S tokens of keys and values; blocks are asked for oldest first.

    Live beside its inputs: an accumulator of q's size in fp32, one block, what the operator needs for one piece; with
    grouped queries a heads-first copy of q.

    Args:
        q: (B, T, Hq, D), T at most S, Hq a multiple of Hkv.

    Returns:
        out (B, T, Hq, D) in the dtype of q, lse (B, Hq, T) fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an operator that cannot compute them.
    """
    check_queries(q, spec)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.float64, device=q.device)
    schedule = spec.schedule(q.shape[0], q.shape[1])
    work = PieceWork(q, spec)
    for index, k, v in _fetched(q, blocks, tuple(schedule), spec):
        for piece in schedule[index]:
            part = work.forward(piece, k, v, spec.bounds[index][0])
            merge_(work.grouped(out.transpose(1, 2), piece, k.shape[2]), work.grouped(lse, piece, k.shape[2]), *part)
    return out.to(q.dtype), lse.to(wide)


@torch.no_grad()
def attention_backward_blocks(
    dout: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: BlockSource,
    sink: GradientSink,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Gradients of `attention_forward_blocks`; blocks are asked for newest first, those that forward read last.

    Live beside its inputs: an accumulator of q's size in fp32, one block, its dK and dV in fp32, what the operator
    needs for one piece; with grouped queries heads-first copies of q, out and dout.

    Args:
        dout, q, out: (B, T, Hq, D). lse: (B, Hq, T). out and lse as `attention_forward_blocks` gave them.
        sink: called once for every block that a query sees, newest first; a block that none sees has no gradient.

    Returns:
        dq (B, T, Hq, D) in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an operator that cannot compute them.
    """
    check_queries(q, spec)
    check_results(dout, q, out, lse)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    schedule = spec.schedule(q.shape[0], q.shape[1])
    work = PieceWork(q, spec, dout=dout, out=out, lse=lse)
    for index, k, v in _fetched(q, blocks, tuple(reversed(schedule)), spec):
        dk, dv = (torch.zeros(k.shape, dtype=lse.dtype, device=k.device) for _ in range(2))
        for piece in schedule[index]:
            first = spec.bounds[index][0]
            part_dq, part_dk, part_dv = work.backward(piece, k, v, first)
            work.grouped(dq.transpose(1, 2), piece, k.shape[2]).add_(part_dq)
            _of_keys(dk, piece, first).add_(part_dk)
            _of_keys(dv, piece, first).add_(part_dv)
        sink(index, dk, dv)
        del dk, dv
    return dq.to(q.dtype)


class PieceWork:
    """The tensors of a call heads first, and one piece of it at a time through the operator that is right for it."""

    def __init__(self, q: torch.Tensor, spec: AttentionSpec, **of_backward: torch.Tensor) -> None:
        self._spec = spec
        self._first_query = spec.queries(q.shape[1])[0]
        self._operator = block_operator(spec.operator, spec.softcap)
        self._tensors = {"q": q, **of_backward}
        self._heads_first: dict[str, torch.Tensor] = {}

    def forward(self, piece: Piece, k: torch.Tensor, v: torch.Tensor, first_key: int) -> Block:
        """out (B, Hkv, group, T, D) and LSE (B, Hkv, group, T) of the piece."""
        keys, values = (_of_keys(tensor, piece, first_key) for tensor in (k, v))
        operator, options = self._how(piece, k.device)
        stacked = _is_stacked(piece, operator)
        out, lse = operator.forward(self._part("q", piece, k.shape[2], stacked), keys, values, **options)
        return _apart(out, piece, k.shape[2], stacked), _apart(lse, piece, k.shape[2], stacked)

    def backward(
        self, piece: Piece, k: torch.Tensor, v: torch.Tensor, first_key: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dq (B, Hkv, group, T, D), dk and dv (B, Hkv, S, D) of the piece."""
        keys, values = (_of_keys(tensor, piece, first_key) for tensor in (k, v))
        operator, options = self._how(piece, k.device)
        stacked = _is_stacked(piece, operator)
        dout, q, out, lse = (self._part(name, piece, k.shape[2], stacked) for name in ("dout", "q", "out", "lse"))
        dq, dk, dv = operator.backward(dout, q, keys, values, out, lse, **options)
        return _apart(dq, piece, k.shape[2], stacked), dk, dv

    def grouped(self, tensor: torch.Tensor, piece: Piece, num_key_heads: int) -> torch.Tensor:
        """The piece's part of a tensor (B, Hq, T, ...), as a view (B, Hkv, group, T, ...)."""
        begin, end = (place - self._first_query for place in piece.queries)
        part = tensor[slice(*piece.rows), :, begin:end]
        return part.unflatten(1, (num_key_heads, -1))

    def _how(self, piece: Piece, device: torch.device) -> tuple[BlockOperator, dict[str, Any]]:
        """Operator and options of a piece."""
        options: dict[str, Any] = {"causal": piece.kind is PieceKind.causal, "scale": self._spec.scale}
        if piece.kind is PieceKind.masked:
            queries, keys = (torch.arange(*span, device=device) for span in (piece.queries, piece.keys))
            distance = queries[:, None] - piece.skip - keys
            near = self._spec.num_keys if self._spec.window is None else self._spec.window
            options["mask"] = (distance >= 0) & (distance < near)
        return piece_operator(self._operator, piece), options

    def _part(self, name: str, piece: Piece, num_key_heads: int, stacked: bool) -> torch.Tensor:
        """The piece's part of a tensor for its operator."""
        part = self.grouped(self._by_heads(name, num_key_heads), piece, num_key_heads)
        # Stacked: a view where the piece has all queries of the call; else a copy of the piece's part.
        return part.flatten(2, 3) if stacked else part.flatten(1, 2)

    def _by_heads(self, name: str, num_key_heads: int) -> torch.Tensor:
        if name not in self._heads_first:
            tensor = self._tensors[name]
            heads_first = tensor if name == "lse" else tensor.transpose(1, 2)
            # Operators want the last axis contiguous; an expanded cotangent is not.
            whole = heads_first.shape[1] == num_key_heads and heads_first.stride(-1) == 1
            self._heads_first[name] = heads_first if whole else heads_first.contiguous()
        return self._heads_first[name]


def _fetched(
    q: torch.Tensor, blocks: BlockSource, order: tuple[int, ...], spec: AttentionSpec
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Index, k and v of every block of `order`; the source is asked to its end, so that it can clean up."""
    given = iter(blocks.fetch(order))
    for index in order:
        block = next(given, None)
        if block is None:
            raise ValueError(f"blocks: the source ended before block {index} of {order}")
        check_keys(q, *block, spec.bounds[index], f"block {index}")
        yield index, *block
    if next(given, None) is not None:
        raise ValueError(f"blocks: the source gave more blocks than the {len(order)} of {order}")


def _is_stacked(piece: Piece, operator: BlockOperator) -> bool:
    """Whether the queries of a group stand one below the other; the reference does so itself, within a tile."""
    return piece.kind is PieceKind.full and operator.name is not AttentionOperator.reference


def _apart(tensor: torch.Tensor, piece: Piece, num_key_heads: int, stacked: bool) -> torch.Tensor:
    """An operator's result for the queries of the piece as (B, Hkv, group, T, ...)."""
    if stacked:
        return tensor.unflatten(2, (-1, piece.queries[1] - piece.queries[0]))
    return tensor.unflatten(1, (num_key_heads, -1))


def _of_keys(tensor: torch.Tensor, piece: Piece, first_key: int) -> torch.Tensor:
    """The piece's part of a block (B, S_block, Hkv, D), heads first."""
    begin, end = (place - first_key for place in piece.keys)
    return tensor[slice(*piece.rows), begin:end].transpose(1, 2)


def check_queries(q: torch.Tensor, spec: AttentionSpec) -> None:
    """Raise ValueError where q is not (B, T, Hq, D) within the spec's keys, or its operator cannot compute it."""
    if q.dim() != 4:
        raise ValueError(f"q {tuple(q.shape)}: (B, T, Hq, D)")
    spec.queries(q.shape[1])
    block_operator(spec.operator, spec.softcap).check(q)


def check_keys(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, what: str) -> None:
    """Raise ValueError where k, v are not the keys of this span, (B, span, Hkv, D) in the dtype and device of q."""
    length = span[1] - span[0]
    fits = k.dim() == 4 and k.shape == v.shape and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0
    if not fits or (k.shape[0], k.shape[1], k.shape[3]) != (q.shape[0], length, q.shape[3]):
        raise ValueError(
            f"{what}: k {tuple(k.shape)}, v {tuple(v.shape)} do not fit q {tuple(q.shape)}: "
            f"(B, {length}, Hkv, D), Hq a multiple of Hkv"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype is not q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{what}: {name} is {tensor.dtype} on {tensor.device}, q {q.dtype} on {q.device}: the same"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{what}: {name} has strides {tensor.stride()}: the last axis must be contiguous")


def check_results(dout: torch.Tensor, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Raise ValueError where dout and out are not like q, or lse is not (B, Hq, T) in fp32 (fp64 for fp64)."""
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype is not q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: as q, {q.dtype} {tuple(q.shape)} "
                f"on {q.device}"
            )
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]) or lse.dtype is not wide or lse.device != q.device:
        raise ValueError(f"lse: {lse.dtype} {tuple(lse.shape)} on {lse.device}: {wide} (B, Hq, T) on {q.device}")
