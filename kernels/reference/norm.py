"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

from enum import StrEnum

import torch


class NormCasting(StrEnum):
    """Where RMSNorm rounds to the input's dtype.

    llama: x / rms(x) is rounded, then multiplied by the weight (and rounded again).
    gemma: x / rms(x) * (1 + weight), all of it in fp32, is rounded once; the weight is stored less one.
    """

    llama = "llama"
    gemma = "gemma"


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting = NormCasting.llama
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension; casting gemma: 1 + weight for weight.

    The mean and the division are taken in fp32, in fp64 for fp64 input. Casting llama rounds the result to the input's
    dtype before the weight is applied, as transformers does for Llama; gemma rounds once, after it.

    Args:
        x: (..., H). weight: (H,), in the dtype of x.

    Returns:
        (..., H), in the dtype of x.
    """
    return rms_norm_scaled(x, weight, eps, casting=casting)[0]


def rms_norm_scaled(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm, and 1 / sqrt(mean(x^2) + eps) of every row, (..., 1) in fp32 (fp64)."""
    wide = widened(x)
    scale = inverse_rms(wide, eps)
    if casting is NormCasting.gemma:
        return (wide * scale * (1.0 + weight.to(wide.dtype))).to(x.dtype), scale
    return weight * as_dtype(wide * scale, x.dtype), scale


def rms_norm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    casting: NormCasting,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of rms_norm, with s = 1 / sqrt(mean(x^2) + eps), H the width and f the factor (weight or 1 + weight).

        dweight = the sum of dy x s over the rows      dx = s (dy f - x s^2 sum(dy f x) / H)

    All of it in fp32 (fp64 for fp64), rounded once.

    Args:
        d_out, x: (..., H). weight: (H,). scale: s, (..., 1) in fp32 (fp64). of_weight: whether the weight's gradient is
            wanted.

    Returns:
        dx in the dtype of x; dweight, (H,) in fp32 (fp64), or None.
    """
    wide = widened(x)
    factor = as_dtype(weight, wide.dtype)
    if casting is NormCasting.gemma:
        factor = 1.0 + factor
    products = (wide * d_out).mul_(scale).flatten(0, -2)
    d_weight = products.sum(0) if of_weight else None
    correction = torch.mv(products, factor).view_as(scale).mul_(scale).mul_(scale)
    del products
    d_x = (factor * d_out).mul_(scale).addcmul_(wide, correction, value=-1.0 / x.shape[-1])
    return as_dtype(d_x, x.dtype), d_weight


def widened(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that norms are computed in: fp32, fp64 for fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype. A cast that changes nothing is a call all the same."""
    return x if x.dtype is dtype else x.to(dtype)


def inverse_rms(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row, (..., 1)."""
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, casting: NormCasting
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual, rounded to their dtype, and rms_norm(s).

    Args:
        x, residual: (..., H), same shape and dtype. weight: (H,).

    Returns:
        The normed sum and the sum, (..., H) each.
    """
    total = x + residual
    return rms_norm(total, weight, eps, casting=casting), total
