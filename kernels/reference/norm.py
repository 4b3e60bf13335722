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
    wide = x if x.dtype is torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting is NormCasting.gemma:
        return (wide * scale * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return weight * (wide * scale).to(x.dtype)


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
