"""Codes on an even grid: value = low + code * step, and how a value between two codes is rounded.

The step is rounded up to 16 significant bits. A code of at most 8 bits times such a step is exact in fp32, so a fused
multiply-add and a product with a sum decode to the same bits; the encoder divides, which nothing contracts. That is
what makes the Triton kernels equal this reference bit for bit.
"""

from __future__ import annotations

import torch

EIGHT_BIT_LEVELS, FOUR_BIT_LEVELS = 255, 15
_LOW_BITS = 0xFF


def grid_step(low: torch.Tensor, high: torch.Tensor, levels: int) -> torch.Tensor:
    """(high - low) / levels in fp32, rounded up to 16 significant bits; 0 for a constant."""
    # A divisor that is a tensor: by a number, CUDA would multiply with the inverse.
    bits = ((high - low) / torch.full_like(low, levels)).view(torch.int32)
    return ((bits + _LOW_BITS) & ~_LOW_BITS).view(torch.float32)


def to_codes(
    x: torch.Tensor, low: torch.Tensor, step: torch.Tensor, levels: int, thresholds: torch.Tensor
) -> torch.Tensor:
    """uint8 codes of x: the lower code, and one more where its distance from it exceeds the threshold.

    Args:
        x: fp32; low and step broadcast to it. Values are clamped to [low, low + levels * step], NaN counts as low.
        thresholds: uniform on [0, 1), of the shape of x.
    """
    place = ((x - low) / torch.where(step == 0, 1.0, step)).nan_to_num(nan=0.0).clamp(0, levels)
    lower = place.floor()
    # Not floor(place + u): that sum is rounded, and would move values that lie on the grid.
    return (lower + (thresholds < place - lower)).to(torch.uint8)


def from_codes(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """low + code * step, in fp32."""
    return codes.float() * step + low


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """(..., C) codes below 16 to (..., ceil(C / 2)) bytes; an even column is the low half of its byte."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor, cols: int) -> torch.Tensor:
    """(..., ceil(cols / 2)) bytes to (..., cols) codes; the inverse of `pack_nibbles`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :cols]
