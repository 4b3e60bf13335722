"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension.

    The mean and the division are taken in fp32, in fp64 for fp64 input; the result is rounded to the input's dtype
    before the weight is applied, as transformers does.

    Args:
        x: (..., H). weight: (H,), in the dtype of x.

    Returns:
        (..., H), in the dtype of x.
    """
    wide = x if x.dtype is torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype)
