"""Rotary positions of q and k, with or without the norm of every head before it: plain or fused, by name."""

from __future__ import annotations

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.norm import check_norm
from headrace.kernels.reference import rope as reference
from headrace.kernels.reference.norm import NormCasting
from headrace.kernels.reference.rope import Pair


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: Backend = Backend.auto
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (x_i, x_{i + D/2}) of every head: x cos + rotate_half(x) sin (Su et al. 2021, arXiv 2104.09864).

    The fused form rotates q and k in one launch, in fp32 and rounded once, into new contiguous tensors; views of a
    joint projection are read through their strides (copied only where the last dimension is not dense). Its backward
    is the rotation by the negative angle and keeps the tables alone; they get no gradient.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D), same dtype and device, D even. cos, sin: (B or 1, T, D), see rope_tables.

    Returns:
        q and k rotated, same shapes and dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot compute this; for the fused
            form also tables that require a gradient or have another dtype than q.
    """
    _check("apply_rope", q, k, cos, sin)
    if choose("apply_rope", backend, q.device, q.dtype).got is Backend.triton:
        from headrace.kernels.fused.rope import fused_apply_rope

        return fused_apply_rope(q, k, cos, sin)
    return reference.apply_rope(q, k, cos, sin)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting = NormCasting.llama,
    backend: Backend = Backend.auto,
) -> tuple[torch.Tensor, torch.Tensor]:
    """apply_rope of rms_norm(q, q_weight) and rms_norm(k, k_weight), per head: Qwen3 (llama), Gemma 3 (gemma).

    The fused form is one launch for q and k (in backward one for each) and keeps q, k and one fp32 per head and token;
    strides and tables as in apply_rope, the weights' gradients deterministic as in rms_norm. Between norm and rotation
    it rounds to the dtype only where the casting says so, the plain form once more.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D). q_weight, k_weight: (D,). cos, sin: (B or 1, T, D). All of one dtype.
        eps, casting: see rms_norm.

    Returns:
        q and k, normed and rotated, same shapes and dtype.

    Raises:
        ValueError: see apply_rope and rms_norm.
    """
    _check("qk_norm_rope", q, k, cos, sin)
    check_norm("qk_norm_rope", q, q_weight, eps, name="q_weight")
    check_norm("qk_norm_rope", k, k_weight, eps, name="k_weight")
    if choose("qk_norm_rope", backend, q.device, q.dtype).got is Backend.triton:
        from headrace.kernels.fused.qk_norm import fused_qk_norm_rope

        return fused_qk_norm_rope(q, k, (q_weight, k_weight), (cos, sin), eps=eps, casting=casting)
    return reference.qk_norm_rope(q, k, (q_weight, k_weight), (cos, sin), eps=eps, casting=casting)


def qk_norm_rope_backward(
    grads: Pair,
    heads: Pair,
    weights: Pair,
    tables: Pair,
    eps: float,
    *,
    backend: Backend = Backend.auto,
    of_weights: bool = True,
) -> tuple[Pair, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Gradients of qk_norm_rope (casting llama) from q and k, without a graph.

    Args:
        grads: of the results. heads: q and k. weights, tables: see qk_norm_rope. of_weights: whether the weights'
            gradients are wanted.

    Returns:
        Of q and k, in their dtype; of the weights, (D,) each in fp32 (fp64 for fp64), or None.

    Raises:
        ValueError: as qk_norm_rope.
    """
    _check("qk_norm_rope_backward", *heads, *tables)
    casting = NormCasting.llama
    if choose("qk_norm_rope", backend, heads[0].device, heads[0].dtype).got is Backend.triton:
        from headrace.kernels.fused.qk_norm import fused_qk_norm_rope_backward

        return fused_qk_norm_rope_backward(grads, heads, weights, tables, eps=eps, casting=casting)
    return reference.qk_norm_rope_backward(
        grads, heads, weights, tables, eps=eps, casting=casting, of_weights=of_weights
    )


def _check(op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() != 4 or q.shape[3] % 2:
        raise ValueError(f"{op}: q {tuple(q.shape)}: expected (B, T, Hq, D), D even")
    batch_size, num_tokens, _, head_size = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch_size, num_tokens, head_size):
        raise ValueError(f"{op}: k {tuple(k.shape)}: expected ({batch_size}, {num_tokens}, Hkv, {head_size}), as q")
    if k.dtype is not q.dtype:
        raise ValueError(f"{op}: k is {k.dtype}: expected {q.dtype}, as q")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[:1] not in ((1,), (batch_size,)) or table.shape[1:] != (num_tokens, head_size):
            expected = f"({batch_size} or 1, {num_tokens}, {head_size})"
            raise ValueError(f"{op}: {name} {tuple(table.shape)}: expected {expected} for q {tuple(q.shape)}")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}: expected {q.device}, as q")
    if cos.shape != sin.shape or cos.dtype is not sin.dtype:
        raise ValueError(f"{op}: sin {tuple(sin.shape)} {sin.dtype}: expected {tuple(cos.shape)} {cos.dtype}, as cos")
