"""One attention function over several operators. Which one is a choice by name, never a silent fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing
from headrace.kernels.reference.attention import dense_attention
from headrace.kernels.streaming import StreamingOperator, streaming_attention

aten = torch.ops.aten
Dense = Callable[..., torch.Tensor]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    packing: Packing | None = None,
    window: int | None = None,
    softcap: float | None = None,
    operator: AttentionOperator = AttentionOperator.auto,
) -> torch.Tensor:
    """Causal attention: token i sees the tokens of its own document up to itself.

        out = softmax(q k^T * scale + mask) v

    Args:
        q: (B, T, Hq, D). k, v: (B, S, Hkv, D), same dtype, Hq a multiple of Hkv. With S > T the queries are the last T
            tokens (decoding).
        packing: documents, where a row holds several; needs S = T.
        window: tokens a query sees, itself included; None means all before it.
        softcap: scores become softcap * tanh(score / softcap); computed in plain torch, tile by tile.

    Returns:
        (B, T, Hq, D), in the dtype of q.

    Raises:
        ValueError: shapes or packing that do not fit, or an operator that cannot do this (dtype, device, window,
            softcap).
        ImportError: operator fa4 without flash-attn-4.
    """
    _check(q, k, v, packing, window)
    if softcap is not None:
        return _softcapped(q, k, v, packing, operator, scale=scale, window=window, softcap=softcap)
    batch_size, num_tokens = q.shape[:2]
    if packing is not None and packing.is_one_per_row(batch_size, num_tokens):
        packing = None
    longest = k.shape[1] if packing is None else max(packing.lengths)
    if window is not None and window >= longest:
        window = None
    chosen = choose_operator(q, window) if operator is AttentionOperator.auto else operator
    if chosen is AttentionOperator.sdpa:
        return _each_document(dense_attention, q, k, v, packing, scale=scale, window=window)
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention operator {chosen.value}: bf16 or fp16 on CUDA, not {q.dtype} on {q.device}; sdpa")
    if chosen is AttentionOperator.flash:
        return _flash(q, k, v, packing, scale=scale, window=window)
    if window is not None:
        raise ValueError(f"attention operator {chosen.value}: no sliding window ({window}); use flash or sdpa")
    dense = _cudnn if chosen is AttentionOperator.cudnn else _fa4
    if num_tokens != k.shape[1]:
        dense = dense_attention
    return _each_document(dense, q, k, v, packing, scale=scale)


def choose_operator(q: torch.Tensor, window: int | None) -> AttentionOperator:
    """What `auto` means for these tensors; see AttentionOperator."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16):
        return AttentionOperator.sdpa
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    if hopper and window is None and not torch.are_deterministic_algorithms_enabled():
        return AttentionOperator.cudnn
    return AttentionOperator.flash


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | None, window: int | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {shapes} do not fit")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"attention: {shapes}: fewer keys than queries")
    if packing is not None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"attention: {shapes}: packed documents need as many keys as queries")
        packing.check(q.shape[0], q.shape[1])
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}: at least 1")


def _each_document(
    dense: Dense, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | None, **options: Any
) -> torch.Tensor:
    """`dense` over the batch, or over every document on its own."""
    if packing is None:
        return dense(q, k, v, **options)
    # split, not slices: its backward is one concatenation instead of a tensor of zeros per document.
    documents = zip(*(tensor.flatten(0, 1).split(packing.lengths) for tensor in (q, k, v)), strict=True)
    outs = [dense(*(part[None] for part in document), **options)[0] for document in documents]
    return torch.cat(outs).view(q.shape)


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing | None,
    operator: AttentionOperator,
    **options: Any,
) -> torch.Tensor:
    """The keys as one block, which the reference takes tile by tile."""
    if operator not in (AttentionOperator.auto, AttentionOperator.sdpa):
        raise ValueError(f"attention operator {operator.value}: no softcap ({options['softcap']}); use sdpa")
    return streaming_attention(
        q, k, v, block_len=k.shape[1], packing=packing, operator=StreamingOperator.reference, **options
    )


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | None, *, scale: float, window: int | None
) -> torch.Tensor:
    """aten flash attention 2; causal means bottom-right here, which is what S > T wants."""
    options = {"scale": scale, "window_size_left": None if window is None else window - 1}
    options["window_size_right"] = None if window is None else 0
    if packing is None:
        out, *_ = aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, **options
        )
        return out
    longest, borders = max(packing.lengths), packing.cu_seqlens
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out, *_ = aten._flash_attention_forward(*flat, borders, borders, longest, longest, 0.0, True, False, **options)
    return out.view(q.shape)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """aten cuDNN attention, T = S; with its LSE, which backward needs."""
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False, scale=scale)
    return out.transpose(1, 2)


def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    return _FlashAttention4.apply(q, k, v, scale)


class _FlashAttention4(torch.autograd.Function):
    """flash-attn-4 called directly, never registered globally; T = S."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=True, return_lse=True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv, *_ = _flash_attn_bwd(
            q,
            k,
            v,
            out,
            dout.contiguous(),
            lse,
            softmax_scale=ctx.scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv, None
