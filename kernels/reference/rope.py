"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in Llama."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from headrace.kernels.reference.norm import NormCasting, rms_norm


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies.

    With wavelength w = 2 pi / f: below original / high_freq_factor f stays, above original / low_freq_factor it becomes
    f / factor, and in between the two are mixed linearly in original / w.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> torch.Tensor:
    """f_i = theta^(-2i / head_dim), i < head_dim / 2, scaled where asked to.

    Returns:
        (head_dim / 2,) fp32 on the CPU: the same bits whatever device or dtype the model has.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    original = scaling.original_max_position
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = original / scaling.low_freq_factor, original / scaling.high_freq_factor
    slow = torch.where(wavelengths > longest, frequencies / scaling.factor, frequencies)
    mix = (original / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    mixed = (1 - mix) * slow / scaling.factor + mix * slow
    between = ~(wavelengths < shortest) * ~(wavelengths > longest)
    return torch.where(between, mixed, slow)


@torch.no_grad()
def rope_tables(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, computed in fp32 and then cast, whatever the dtype.

    Args:
        positions: (B, T) int64. frequencies: (D / 2,) fp32 on the same device, see rope_frequencies.

    Returns:
        cos, sin: (B, T, D) each; the second half repeats the first.
    """
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (x_i, x_{i + D/2}) of every head: x cos + rotate_half(x) sin.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D). cos, sin: (B or 1, T, D).

    Returns:
        q and k rotated, same shapes and dtype.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    *,
    eps: float,
    casting: NormCasting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of every head of q and of k, then their rotation, as in Qwen3 and Gemma 3.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D). weights: of q and of k, (D,) each. tables: cos and sin, see apply_rope.

    Returns:
        q and k, same shapes and dtype.
    """
    q, k = (rms_norm(x, weight, eps, casting=casting) for x, weight in zip((q, k), weights, strict=True))
    return apply_rope(q, k, *tables)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
