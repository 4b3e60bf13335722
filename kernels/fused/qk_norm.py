"""Norm and rotation of every head of q and k in one launch, and its backward. See kernels/rope.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from headrace.kernels.fused.rope import (
    Pair,
    check_tables,
    dense_last,
    heads_shape,
    load_halves,
    load_tables,
    store_halves,
    table_views,
    tile_heads,
)
from headrace.kernels.reference.norm import NormCasting, inverse_rms

# Programs of the backward kernel: the weight's gradient takes an fp32 row of each.
PROGRAMS = 1024


@triton.jit
def _factors(weight_ptr, columns, GEMMA: tl.constexpr, HALF: tl.constexpr):
    """Both halves of a norm's weight, or of 1 + weight, fp32."""
    first, second = load_halves(weight_ptr, columns, columns < HALF, HALF)
    if GEMMA:
        first += 1.0
        second += 1.0
    return first, second


@triton.jit
def _norm_rotate_heads(
    x_ptr,
    stride,
    weight_ptr,
    out_ptr,
    rstd_ptr,
    eps,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    columns,
    HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """Norm and rotate the heads of one token; the pointers are at it."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    factor_1, factor_2 = _factors(weight_ptr, columns, GEMMA, HALF)
    for begin in tl.static_range(0, HEADS, TILE_HEADS):
        heads = (begin + tl.arange(0, TILE_HEADS)[:, None]).to(tl.int64)
        mask = (heads < HEADS) & (columns < HALF)
        first, second = load_halves(x_ptr, heads * stride + columns, mask, HALF)
        squares = tl.sum(first * first + second * second, axis=1)[:, None]
        rstd = tl.rsqrt(squares / (2 * HALF) + eps)
        first, second = first * rstd, second * rstd
        if not GEMMA:
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        first, second = first * factor_1, second * factor_2
        turned_1, turned_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
        store_halves(out_ptr, heads * (2 * HALF) + columns, turned_1, turned_2, mask, HALF)
        tl.store(rstd_ptr + heads, rstd, mask=heads < HEADS)


@triton.jit
def qk_norm_rope_forward(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    eps,
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
    GEMMA: tl.constexpr,
):
    """One token per program, as rope_rotate, with the norm of every head before the rotation."""
    place = tl.program_id(0).to(tl.int64)
    row, token = place // num_tokens, place % num_tokens
    columns = tl.arange(0, BLOCK)[None, :]
    offset = row * table_stride_batch + token * table_stride_token
    cos_1, cos_2, sin_1, sin_2 = load_tables(cos_ptr, sin_ptr, offset, columns, columns < HALF, HALF)
    eps = tl.cast(eps, tl.float32)
    q_ptr += row * q_stride_batch + token * q_stride_token
    k_ptr += row * k_stride_batch + token * k_stride_token
    q_out_ptr += place * (Q_HEADS * 2 * HALF)
    k_out_ptr += place * (K_HEADS * 2 * HALF)
    q_rstd_ptr += place * Q_HEADS
    k_rstd_ptr += place * K_HEADS
    _norm_rotate_heads(
        q_ptr, q_stride_head, q_weight_ptr, q_out_ptr, q_rstd_ptr, eps, cos_1, cos_2, sin_1, sin_2, columns,
        Q_HEADS, Q_TILE, HALF, GEMMA,
    )  # fmt: skip
    _norm_rotate_heads(
        k_ptr, k_stride_head, k_weight_ptr, k_out_ptr, k_rstd_ptr, eps, cos_1, cos_2, sin_1, sin_2, columns,
        K_HEADS, K_TILE, HALF, GEMMA,
    )  # fmt: skip


@triton.jit
def qk_norm_rope_backward(
    d_out_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    d_x_ptr,
    partial_ptr,
    num_tokens,
    num_places,
    places_per_program,
    d_stride_batch,
    d_stride_token,
    d_stride_head,
    x_stride_batch,
    x_stride_token,
    x_stride_head,
    table_stride_batch,
    table_stride_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    GEMMA: tl.constexpr,
):
    """Of q or of k: a run of tokens per program; its share of the weight's gradient stays in registers."""
    program = tl.program_id(0).to(tl.int64)
    first_place = program * places_per_program
    last_place = tl.minimum(first_place + places_per_program, num_places)
    columns = tl.arange(0, BLOCK)[None, :]
    factor_1, factor_2 = _factors(weight_ptr, columns, GEMMA, HALF)
    d_weight_1, d_weight_2 = tl.zeros((TILE_HEADS, BLOCK), tl.float32), tl.zeros((TILE_HEADS, BLOCK), tl.float32)
    # A while loop: the interpreter takes no range over numbers that are known at run time alone.
    place = first_place
    while place < last_place:
        row, token = place // num_tokens, place % num_tokens
        offset = row * table_stride_batch + token * table_stride_token
        cos_1, cos_2, sin_1, sin_2 = load_tables(cos_ptr, sin_ptr, offset, columns, columns < HALF, HALF)
        for begin in tl.static_range(0, HEADS, TILE_HEADS):
            heads = (begin + tl.arange(0, TILE_HEADS)[:, None]).to(tl.int64)
            mask = (heads < HEADS) & (columns < HALF)
            d_offsets = row * d_stride_batch + token * d_stride_token + heads * d_stride_head + columns
            d_first, d_second = load_halves(d_out_ptr, d_offsets, mask, HALF)
            d_normed_1, d_normed_2 = d_first * cos_1 + d_second * sin_2, d_second * cos_2 - d_first * sin_1
            x_offsets = row * x_stride_batch + token * x_stride_token + heads * x_stride_head + columns
            first, second = load_halves(x_ptr, x_offsets, mask, HALF)
            rstd = tl.load(rstd_ptr + place * HEADS + heads, mask=heads < HEADS, other=0.0)
            unit_1, unit_2 = first * rstd, second * rstd
            d_weight_1 += d_normed_1 * unit_1
            d_weight_2 += d_normed_2 * unit_2
            d_unit_1, d_unit_2 = d_normed_1 * factor_1, d_normed_2 * factor_2
            correction = tl.sum(d_unit_1 * unit_1 + d_unit_2 * unit_2, axis=1)[:, None] / (2 * HALF)
            d_first, d_second = (d_unit_1 - unit_1 * correction) * rstd, (d_unit_2 - unit_2 * correction) * rstd
            d_x_offsets = (place * HEADS + heads) * (2 * HALF) + columns
            store_halves(d_x_ptr, d_x_offsets, d_first, d_second, mask, HALF)
        place += 1
    share = program * (2 * HALF) + columns
    sum_1, sum_2 = tl.sum(d_weight_1, axis=0)[None, :], tl.sum(d_weight_2, axis=0)[None, :]
    store_halves(partial_ptr, share, sum_1, sum_2, columns < HALF, HALF)


class _QKNormRope(torch.autograd.Function):
    """Keeps q, k and one fp32 per head and token."""

    @staticmethod
    def forward(ctx: Any, eps: float, gemma: bool, *tensors: torch.Tensor) -> Pair:
        q, k, q_weight, k_weight, cos, sin = tensors
        q, k, q_weight, k_weight = dense_last(q), dense_last(k), q_weight.contiguous(), k_weight.contiguous()
        cos, sin, *table_strides = table_views(cos, sin)
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        rstds = [torch.empty(x.shape[:3], dtype=torch.float32, device=x.device) for x in (q, k)]
        with torch.cuda.device_of(q):
            qk_norm_rope_forward[(q.shape[0] * q.shape[1],)](
                q,
                k,
                q_weight,
                k_weight,
                cos,
                sin,
                *outs,
                *rstds,
                eps,
                q.shape[1],
                *q.stride()[:3],
                *k.stride()[:3],
                *table_strides,
                **heads_shape(q, k),
                GEMMA=gemma,
            )
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, *rstds)
        ctx.gemma = gemma
        return outs[0], outs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_q: torch.Tensor, d_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
        d_q, d_q_weight = _norm_gradients(d_q, q, q_weight, q_rstd, (cos, sin), gemma=ctx.gemma)
        d_k, d_k_weight = _norm_gradients(d_k, k, k_weight, k_rstd, (cos, sin), gemma=ctx.gemma)
        return None, None, d_q, d_k, d_q_weight.to(q_weight.dtype), d_k_weight.to(k_weight.dtype), None, None


def _norm_gradients(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, tables: Pair, *, gemma: bool
) -> Pair:
    """Of q (or k) and, in fp32, of its norm's weight."""
    d_out = dense_last(d_out)
    cos, sin, *table_strides = table_views(*tables)
    batch_size, num_tokens, num_heads, head_size = x.shape
    num_places, half = batch_size * num_tokens, head_size // 2
    places = max(1, triton.cdiv(num_places, PROGRAMS))
    programs = triton.cdiv(num_places, places)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partial = torch.empty(programs, head_size, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        qk_norm_rope_backward[(programs,)](
            d_out,
            x,
            weight,
            cos,
            sin,
            rstd,
            d_x,
            partial,
            num_tokens,
            num_places,
            places,
            *d_out.stride()[:3],
            *x.stride()[:3],
            *table_strides,
            HEADS=num_heads,
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            TILE_HEADS=tile_heads(num_heads, half),
            GEMMA=gemma,
            num_warps=8,
        )
    return d_x, partial.sum(0)


def fused_qk_norm_rope(
    q: torch.Tensor, k: torch.Tensor, weights: Pair, tables: Pair, *, eps: float, casting: NormCasting
) -> Pair:
    """kernels.rope.qk_norm_rope by Triton; the weights of q and of k, cos and sin. Raises as fused_apply_rope."""
    check_tables("qk_norm_rope", q, tables)
    return _QKNormRope.apply(eps, casting is NormCasting.gemma, q, k, *weights, *tables)


def fused_qk_norm_rope_backward(
    grads: Pair, heads: Pair, weights: Pair, tables: Pair, *, eps: float, casting: NormCasting
) -> tuple[Pair, Pair]:
    """kernels.rope.qk_norm_rope_backward by Triton. The scale of every row comes from plain torch."""
    check_tables("qk_norm_rope_backward", heads[0], tables)
    found = []
    for grad, x, weight in zip(grads, heads, weights, strict=True):
        x, rstd = dense_last(x), inverse_rms(x.float(), eps)[..., 0]
        gemma = casting is NormCasting.gemma
        found.append(_norm_gradients(grad, x, weight.contiguous(), rstd.contiguous(), tables, gemma=gemma))
    (d_q, d_q_weight), (d_k, d_k_weight) = found
    return (d_q, d_k), (d_q_weight, d_k_weight)
