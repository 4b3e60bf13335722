"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as in Llama."""

from __future__ import annotations

import math

import torch

from headrace.kernels.reference.norm import NormCasting, inverse_rms, rms_norm, rms_norm_backward, widened
from headrace.kernels.rope_scaling import RopeScaling, RopeType

Pair = tuple[torch.Tensor, torch.Tensor]


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, length: int | None = None
) -> torch.Tensor:
    """f_i = theta^(-2i / head_dim), i < head_dim / 2, scaled where asked to.

    Every step is taken in the order and dtype of transformers, so that the bits are the same.

    Args:
        length: tokens of the sequence, which only the dynamic type depends on; None: not beyond the original length.

    Returns:
        (head_dim / 2,) fp32 on the CPU: the same bits whatever device or dtype the model has.
    """
    base: float | torch.Tensor = theta
    if scaling is not None and scaling.type is RopeType.dynamic:
        base = _dynamic_base(head_dim, theta, scaling, length)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    powers = base**exponents
    frequencies = 1.0 / powers
    if scaling is None or scaling.type is RopeType.dynamic:
        return frequencies
    if scaling.type is RopeType.linear:
        return frequencies / scaling.factor
    if scaling.type is RopeType.yarn:
        return _yarn(head_dim, theta, powers, scaling)
    return _llama3(frequencies, scaling)


def _dynamic_base(head_dim: int, theta: float, scaling: RopeScaling, length: int | None) -> float | torch.Tensor:
    """theta (factor L / original - (factor - 1))^(d / (d - 2)) for a length L beyond the original one."""
    original, factor = scaling.original_max_position, scaling.factor
    exponent = head_dim / (head_dim - 2)
    if length is None or length <= original:
        return float(theta * (factor * original / original - (factor - 1)) ** exponent)
    # A tensor: transformers takes the length from the positions, and this arithmetic is fp32 there.
    return theta * (factor * torch.tensor(length, device="cpu") / original - (factor - 1)) ** exponent


def _yarn(head_dim: int, theta: float, powers: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Between two dimensions a linear ramp from the plain frequency to that over `factor` (arXiv 2309.00071)."""

    def dimension(num_turns: float) -> float:
        turns = scaling.original_max_position / (num_turns * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    plain_share = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - plain_share) + 1.0 / powers * plain_share


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """With wavelength w = 2 pi / f: below original / high f stays, above original / low it becomes f / factor, and in
    between the two are mixed linearly in original / w.
    """
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
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position times frequency, computed in fp32 and then cast, whatever the dtype.

    Args:
        positions: (B, T) int64. frequencies: (D / 2,), or (B, T, D / 2) where tokens differ, fp32 on the same device,
            see rope_frequencies. scale: of both tables, see RopeScaling.table_scale.

    Returns:
        cos, sin: (B, T, D) each; the second half repeats the first.
    """
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the pairs (x_i, x_{i + D/2}) of every head: x cos + rotate_half(x) sin.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D). cos, sin: (B or 1, T, D).

    Returns:
        q and k rotated, same shapes and dtype.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: Pair,
    tables: Pair,
    *,
    eps: float,
    casting: NormCasting,
) -> Pair:
    """RMSNorm of every head of q and of k, then their rotation, as in Qwen3 and Gemma 3.

    Args:
        q: (B, T, Hq, D). k: (B, T, Hkv, D). weights: of q and of k, (D,) each. tables: cos and sin, see apply_rope.

    Returns:
        q and k, same shapes and dtype.
    """
    q, k = (rms_norm(x, weight, eps, casting=casting) for x, weight in zip((q, k), weights, strict=True))
    return apply_rope(q, k, *tables)


def qk_norm_rope_backward(
    grads: Pair, heads: Pair, weights: Pair, tables: Pair, *, eps: float, casting: NormCasting, of_weights: bool
) -> tuple[Pair, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Gradients of qk_norm_rope: the rotation by the negative angle, then those of both norms.

    Args:
        grads: of q and of k. heads: q and k themselves, as qk_norm_rope reads them. of_weights: whether the weights'
            gradients are wanted.

    Returns:
        Of q and k; of the weights, fp32 (fp64 for fp64), or None.
    """
    cos, sin = tables
    (d_q, d_q_weight), (d_k, d_k_weight) = (
        rms_norm_backward(grad, x, weight, inverse_rms(widened(x), eps), casting=casting, of_weight=of_weights)
        for grad, x, weight in zip(apply_rope(*grads, cos, -sin), heads, weights, strict=True)
    )
    return (d_q, d_k), (d_q_weight, d_k_weight)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
