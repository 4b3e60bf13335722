"""The attention contract over keys and values that are all at hand: forward, exact backward, and both under autograd.

    out, lse = attention_forward(q, k, v, spec)
    dq, dk, dv = attention_backward(dout, q, k, v, out, lse, spec)

What is held between them, and where, is the caller's choice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from headrace.kernels.attention.blocks import (
    ResidentBlocks,
    attention_backward_blocks,
    attention_forward_blocks,
    check_keys,
    check_queries,
    check_results,
)
from headrace.kernels.attention.cut import Piece, PieceKind, block_pieces
from headrace.kernels.attention.operators import FlashBlocks, block_operator, piece_operator
from headrace.kernels.attention.spec import AttentionSpec, spec_for
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing
from headrace.kernels.reference.norm import as_dtype

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    packing: Packing | None = None,
    window: int | None = None,
    softcap: float | None = None,
    block_len: int | None = None,
    operator: AttentionOperator = AttentionOperator.auto,
) -> torch.Tensor:
    """Causal attention with autograd: token i sees its own document up to itself, and those that it continues.

        out = softmax(q k^T * scale + mask) v

    Args:
        q: (B, T, Hq, D). k, v: (B, S, Hkv, D), same dtype, Hq a multiple of Hkv. With S > T the queries are the last T
            tokens (decoding).
        packing: documents that fill the (B, S) keys, where a row holds several.
        window: tokens a query sees, itself included; None means all before it.
        softcap: scores become softcap * tanh(score / softcap); computed in plain torch, tile by tile.
        block_len: keys per KV block; None: all keys at once.

    Returns:
        (B, T, Hq, D), in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or packing that do not fit, or an operator that cannot do this.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: {shapes} do not fit: q (B, T, Hq, D), k and v (B, S, Hkv, D)")
    spec = spec_for(
        q,
        k.shape[1],
        scale=scale,
        operator=operator,
        block_len=block_len,
        packing=packing,
        window=window,
        softcap=softcap,
    )
    return _Attention.apply(q, k, v, spec)


@torch.no_grad()
def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of T queries over S keys.

    Args:
        q: (B, T, Hq, D). k, v: (B, S, Hkv, D), Hq a multiple of Hkv.

    Returns:
        out (B, T, Hq, D) in the dtype of q, lse (B, Hq, T) fp32 (fp64 for fp64), natural logarithm.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an operator that cannot compute them.
    """
    _check(q, k, v, spec)
    if _is_one_flash_call(q, spec):
        return FlashBlocks.forward_rows(q, k, v, spec.packing, scale=spec.scale, window=spec.window)
    pieces = _squares(q, spec)
    if pieces is None:
        return attention_forward_blocks(q, ResidentBlocks(k, v, spec.bounds), spec)
    if len(pieces) == 1:
        out, lse = _square_forward(pieces[0], q, k, v, spec)
        return as_dtype(out, q.dtype), lse.contiguous()
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide, device=q.device)
    for piece in pieces:
        rows, tokens = slice(*piece.rows), slice(*piece.queries)
        out[rows, tokens], lse[rows, :, tokens] = _square_forward(piece, q, k, v, spec)
    return out, lse


@torch.no_grad()
def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: AttentionSpec,
) -> Gradients:
    """Gradients of `attention_forward`.

    Args:
        dout, q, out: (B, T, Hq, D). k, v: (B, S, Hkv, D). lse: (B, Hq, T). out and lse as forward gave them.

    Returns:
        dq, dk, dv in the shapes and the dtype of q, k, v; keys that no query sees have gradient 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an operator that cannot compute them.
    """
    _check(q, k, v, spec)
    check_results(dout, q, out, lse)
    if _is_one_flash_call(q, spec):
        return FlashBlocks.backward_rows(dout, q, k, v, out, lse, spec.packing, scale=spec.scale, window=spec.window)
    pieces = _squares(q, spec)
    if pieces is None:
        return _backward_by_blocks(dout, q, k, v, out, lse, spec)
    if len(pieces) == 1:
        dq, dk, dv = _square_backward(pieces[0], (dout, q, k, v, out), lse, spec)
        return as_dtype(dq, q.dtype), as_dtype(dk, q.dtype), as_dtype(dv, q.dtype)
    grads = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    for piece in pieces:
        rows, tokens = slice(*piece.rows), slice(*piece.queries)
        for grad, part in zip(grads, _square_backward(piece, (dout, q, k, v, out), lse, spec), strict=True):
            grad[rows, tokens] = part
    dq, dk, dv = grads
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
        out, lse = attention_forward(q, k, v, spec)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec = spec
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *attention_backward(dout, q, k, v, out, lse, ctx.spec), None


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> None:
    check_queries(q, spec)
    check_keys(q, k, v, (0, spec.num_keys), "attention")


def _is_one_flash_call(q: torch.Tensor, spec: AttentionSpec) -> bool:
    """On CUDA flash takes whole rows with documents and windows in one call; its causal mask then has one meaning.

    It knows no documents that continue another one.
    """
    whole = spec.block_len is None and q.shape[1] == spec.num_keys and not spec.continues
    return whole and q.is_cuda and spec.operator is AttentionOperator.flash


def _squares(q: torch.Tensor, spec: AttentionSpec) -> tuple[Piece, ...] | None:
    """The causal squares on the diagonal where they are all there is: nothing is merged then. None: there is more."""
    if spec.block_len is not None or spec.window is not None or q.shape[1] != spec.num_keys or spec.continues:
        return None
    if spec.packing is None:
        return _one_square(q.shape[0], q.shape[1])
    (pieces,) = spec.schedule(q.shape[0], q.shape[1]).values()
    return pieces


# Asked for every block of every step.
@lru_cache(maxsize=64)
def _one_square(batch_size: int, num_tokens: int) -> tuple[Piece, ...]:
    whole = (0, num_tokens)
    return block_pieces(whole, whole, batch_size=batch_size)


def _of_square(piece: Piece, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tokens of a square, heads first."""
    if (piece.rows[1] - piece.rows[0], piece.queries[1] - piece.queries[0]) == tensors[0].shape[:2]:
        return [tensor.transpose(1, 2) for tensor in tensors]
    return [tensor[slice(*piece.rows), slice(*piece.queries)].transpose(1, 2) for tensor in tensors]


def _square_forward(
    piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, T, Hq, D), lse (B, Hq, T) of one square."""
    operator = piece_operator(block_operator(spec.operator, spec.softcap), piece)
    causal = piece.kind is PieceKind.causal
    out, lse = operator.forward(*_of_square(piece, q, k, v), causal=causal, scale=spec.scale)
    return out.transpose(1, 2), lse


def _square_backward(
    piece: Piece, tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, spec: AttentionSpec
) -> Gradients:
    """dq, dk, dv (B, T, H, D) of one square; `tensors` are dout, q, k, v, out of the call."""
    operator = piece_operator(block_operator(spec.operator, spec.softcap), piece)
    dout, q, k, v, out = _of_square(piece, *tensors)
    # Operators want the last axis contiguous; an expanded cotangent is not.
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    square_lse = lse
    if (piece.rows[1] - piece.rows[0], piece.queries[1] - piece.queries[0]) != (lse.shape[0], lse.shape[2]):
        square_lse = lse[slice(*piece.rows), :, slice(*piece.queries)]
    causal = piece.kind is PieceKind.causal
    dq, dk, dv = operator.backward(dout, q, k, v, out, square_lse, causal=causal, scale=spec.scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _backward_by_blocks(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    spec: AttentionSpec,
) -> Gradients:
    bounds = spec.bounds
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))

    def sink(index: int, block_dk: torch.Tensor, block_dv: torch.Tensor) -> None:
        begin, end = bounds[index]
        dk[:, begin:end] = block_dk
        dv[:, begin:end] = block_dv

    dq = attention_backward_blocks(dout, q, out, lse, ResidentBlocks(k, v, bounds), sink, spec)
    return dq, dk, dv
