"""Encode and decode in plain torch: the definition. `fused/codecs.py` has the same functions in Triton.

Ranges are fp32: low end and step of a row (R, 1, 2) or of its groups (R, groups, 2).
"""

from __future__ import annotations

import torch

from headrace.kernels.codecs.config import GROUP_SIZE
from headrace.kernels.codecs.grid import (
    EIGHT_BIT_LEVELS,
    FOUR_BIT_LEVELS,
    from_codes,
    grid_step,
    pack_nibbles,
    to_codes,
    unpack_nibbles,
)
from headrace.kernels.codecs.philox import uniforms


def encode_eight_bit(x: torch.Tensor, seed: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, C) uint8 and ranges (R, 1, 2) of x (R, C)."""
    rows, cols = x.shape
    low, high = (end.float() for end in torch.aminmax(x, dim=-1, keepdim=True))
    step = grid_step(low, high, EIGHT_BIT_LEVELS)
    random = uniforms(rows, cols, seed, stream, x.device)
    return to_codes(x.float(), low, step, EIGHT_BIT_LEVELS, random), torch.stack((low, step), dim=-1)


def decode_eight_bit(codes: torch.Tensor, ranges: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of what `encode_eight_bit` wrote."""
    return from_codes(codes, ranges[..., 0], ranges[..., 1]).to(dtype)


def encode_four_bit(x: torch.Tensor, seed: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, ceil(C / 2)) uint8 and ranges (R, ceil(C / GROUP_SIZE), 2) of x (R, C)."""
    rows, cols = x.shape
    grouped = _grouped(x.float())
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    step = grid_step(low, high, FOUR_BIT_LEVELS)
    random = _grouped(uniforms(rows, cols, seed, stream, x.device))
    codes = to_codes(grouped, low, step, FOUR_BIT_LEVELS, random).flatten(1)[:, :cols]
    return pack_nibbles(codes), torch.cat((low, step), dim=-1)


def decode_four_bit(packed: torch.Tensor, ranges: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of what `encode_four_bit` wrote."""
    low, step = (end.repeat_interleave(GROUP_SIZE, dim=1)[:, :cols] for end in ranges.unbind(-1))
    return from_codes(unpack_nibbles(packed, cols), low, step).to(dtype)


def _grouped(x: torch.Tensor) -> torch.Tensor:
    """(R, C) as (R, groups, GROUP_SIZE); the last group is filled up with the row's last element."""
    missing = -x.shape[1] % GROUP_SIZE
    if missing:
        x = torch.cat((x, x[:, -1:].expand(-1, missing)), dim=1)
    return x.unflatten(1, (-1, GROUP_SIZE))
