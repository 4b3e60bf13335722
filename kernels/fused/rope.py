"""Rotary positions of q and k in one launch. See kernels/rope.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# Elements of one tile: heads x half a head.
TILE = 2048

Pair = tuple[torch.Tensor, torch.Tensor]


@triton.jit
def load_tables(cos_ptr, sin_ptr, offset, columns, mask, HALF: tl.constexpr):
    """Both halves of a token's cos and sin, fp32."""
    cos_1 = tl.load(cos_ptr + offset + columns, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + offset + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + offset + columns, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + offset + HALF + columns, mask=mask, other=0.0).to(tl.float32)
    return cos_1, cos_2, sin_1, sin_2


@triton.jit
def load_halves(ptr, offsets, mask, HALF: tl.constexpr):
    """x_i and x_{i + D/2}, fp32."""
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(ptr, offsets, first, second, mask, HALF: tl.constexpr):
    """x_i and x_{i + D/2}, rounded to the dtype that ptr has."""
    tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_heads(
    x_ptr,
    stride,
    out_ptr,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    columns,
    HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate the heads of one token; x_ptr and out_ptr point at it."""
    for begin in tl.static_range(0, HEADS, TILE_HEADS):
        heads = (begin + tl.arange(0, TILE_HEADS)[:, None]).to(tl.int64)
        mask = (heads < HEADS) & (columns < HALF)
        first, second = load_halves(x_ptr, heads * stride + columns, mask, HALF)
        turned_1, turned_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
        store_halves(out_ptr, heads * (2 * HALF) + columns, turned_1, turned_2, mask, HALF)


@triton.jit
def rope_rotate(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    num_tokens,
    q_stride_batch,
    q_stride_token,
    q_stride_head,
    k_stride_batch,
    k_stride_token,
    k_stride_head,
    table_stride_batch,
    table_stride_token,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One token per program: all heads of q, then of k. BACKWARD is the transpose, the rotation by minus the angle."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // num_tokens, place % num_tokens
    columns = tl.arange(0, BLOCK)[None, :]
    offset = row * table_stride_batch + token * table_stride_token
    cos_1, cos_2, sin_1, sin_2 = load_tables(cos_ptr, sin_ptr, offset, columns, columns < HALF, HALF)
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1
    q_ptr += row * q_stride_batch + token * q_stride_token
    k_ptr += row * k_stride_batch + token * k_stride_token
    q_out_ptr += place * (Q_HEADS * 2 * HALF)
    k_out_ptr += place * (K_HEADS * 2 * HALF)
    _rotate_heads(q_ptr, q_stride_head, q_out_ptr, cos_1, cos_2, sin_1, sin_2, columns, Q_HEADS, Q_TILE, HALF)
    _rotate_heads(k_ptr, k_stride_head, k_out_ptr, cos_1, cos_2, sin_1, sin_2, columns, K_HEADS, K_TILE, HALF)


def tile_heads(num_heads: int, half: int) -> int:
    """Heads of one tile: all of them where they fit it."""
    fitting = max(1, TILE // triton.next_power_of_2(half))
    return min(triton.next_power_of_2(num_heads), fitting)


def dense_last(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def table_views(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Both tables with one pair of strides (batch, token); a table of one row has batch stride 0."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)


def _rotated(q: torch.Tensor, k: torch.Tensor, tables: Pair, *, backward: bool) -> Pair:
    """q and k rotated into new contiguous tensors, or back."""
    q, k = dense_last(q), dense_last(k)
    cos, sin, *table_strides = table_views(*tables)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    with torch.cuda.device_of(q):
        rope_rotate[(q.shape[0] * q.shape[1],)](
            q,
            k,
            cos,
            sin,
            *outs,
            q.shape[1],
            *q.stride()[:3],
            *k.stride()[:3],
            *table_strides,
            **heads_shape(q, k),
            BACKWARD=backward,
        )
    return outs[0], outs[1]


def heads_shape(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    """The compile-time arguments that the two forward kernels share."""
    half = q.shape[3] // 2
    return {
        "Q_HEADS": q.shape[2],
        "K_HEADS": k.shape[2],
        "HALF": half,
        "BLOCK": triton.next_power_of_2(half),
        "Q_TILE": tile_heads(q.shape[2], half),
        "K_TILE": tile_heads(k.shape[2], half),
    }


class _Rope(torch.autograd.Function):
    """Keeps the tables alone."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, (cos, sin), backward=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_q: torch.Tensor, d_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotated(d_q, d_k, (cos, sin), backward=True), None, None


def fused_apply_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
    """kernels.rope.apply_rope by Triton. Raises ValueError for tables of another dtype or that require a gradient."""
    check_tables("apply_rope", q, (cos, sin))
    return _Rope.apply(q, k, cos, sin)


def check_tables(op: str, q: torch.Tensor, tables: Pair) -> None:
    """Raises ValueError for tables of another dtype than q, or that require a gradient."""
    for name, table in zip(("cos", "sin"), tables, strict=True):
        if table.dtype is not q.dtype:
            raise ValueError(f"{op}: {name} is {table.dtype}: expected {q.dtype}, as q")
        if table.requires_grad:
            raise ValueError(f"{op}: {name} requires a gradient: the fused form has none for it; backend=reference")
