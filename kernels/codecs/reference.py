"""Encode and decode in plain torch: the definition. `fused/codecs.py` has the same functions in Triton.

All take contiguous tensors seen as rows x columns; seed None stands for nearest rounding. Ranges are (..., 2) fp32:
low end and step.
"""

from __future__ import annotations

import torch

from headrace.kernels.codecs.activations import Activation, derivative, fixed_grid, swiglu_factors
from headrace.kernels.codecs.grid import (
    EIGHT_BIT_LEVELS,
    FOUR_BIT_LEVELS,
    from_codes,
    grid_step,
    pack_nibbles,
    thresholds,
    to_codes,
    unpack_nibbles,
)


def encode_rows(x: torch.Tensor, seed: int | None, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes (R, C) uint8 and ranges (R, 2) of x (R, C), a range per row."""
    rows, cols = x.shape
    if cols == 0:
        return torch.empty(rows, 0, dtype=torch.uint8, device=x.device), torch.zeros(rows, 2, device=x.device)
    low, high = (end.float() for end in torch.aminmax(x, dim=-1))
    ranges = torch.stack((low, grid_step(low, high, EIGHT_BIT_LEVELS)), dim=-1)
    return encode_given(x, ranges, seed, stream), ranges


def encode_given(x: torch.Tensor, ranges: torch.Tensor, seed: int | None, stream: int) -> torch.Tensor:
    """8-bit codes (R, C) uint8 of x (R, C); row r takes ranges[r % G] of ranges (G, 2), and is clamped to it."""
    rows, cols = x.shape
    low, step = _spread(ranges, rows)
    random = thresholds(rows, cols, seed, stream, x.device)
    return to_codes(x.float(), low, step, EIGHT_BIT_LEVELS, random)


def decode_rows(codes: torch.Tensor, ranges: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of 8-bit codes (R, C); row r takes ranges[r % G] of ranges (G, 2)."""
    return from_codes(codes, *_spread(ranges, codes.shape[0])).to(dtype)


def _spread(ranges: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low ends and steps (R, 1) of every row."""
    if rows != len(ranges):
        ranges = ranges.repeat(rows // max(len(ranges), 1), 1)
    return ranges[:, 0:1], ranges[:, 1:2]


def encode_groups(x: torch.Tensor, group_size: int, seed: int | None, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit codes (R, ceil(C / 2)) uint8 and ranges (R, ceil(C / group_size), 2) of x (R, C)."""
    rows, cols = x.shape
    if x.numel() == 0:
        num_groups = -(-cols // group_size)
        packed = torch.empty(rows, -(-cols // 2), dtype=torch.uint8, device=x.device)
        return packed, torch.empty(rows, num_groups, 2, device=x.device)
    grouped = _grouped(x.float(), group_size)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    step = grid_step(low, high, FOUR_BIT_LEVELS)
    random = thresholds(rows, cols, seed, stream, x.device)
    if isinstance(random, torch.Tensor):
        random = _grouped(random, group_size)
    codes = to_codes(grouped, low, step, FOUR_BIT_LEVELS, random).view(rows, -1)[:, :cols]
    return pack_nibbles(codes), torch.cat((low, step), dim=-1)


def decode_groups(
    packed: torch.Tensor, ranges: torch.Tensor, cols: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Values (R, C) of what `encode_groups` wrote."""
    low, step = (end.repeat_interleave(group_size, dim=1)[:, :cols] for end in ranges.unbind(-1))
    return from_codes(unpack_nibbles(packed, cols), low, step).to(dtype)


def _grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """(R, C) as (R, groups, group_size); the last group is filled up with the row's last element."""
    missing = -x.shape[1] % group_size
    if missing:
        x = torch.cat((x, x[:, -1:].expand(-1, missing)), dim=1)
    return x.view(x.shape[0], -1, group_size)


def encode_derivative(x: torch.Tensor, activation: Activation, seed: int | None, stream: int) -> torch.Tensor:
    """4-bit codes (ceil(N / 2),) uint8 of f'(x) for x (N,), on the fixed grid of the activation."""
    low, step = _fixed(activation, x.device)
    random = thresholds(1, x.numel(), seed, stream, x.device)
    if isinstance(random, torch.Tensor):
        random = random[0]
    return pack_nibbles(to_codes(derivative(x.float(), activation), low, step, FOUR_BIT_LEVELS, random))


def decode_derivative(
    packed: torch.Tensor, num_elements: int, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    """f'(x) (N,) of what `encode_derivative` wrote."""
    return _derivative_of(packed, num_elements, activation).to(dtype)


def derivative_backward(grad: torch.Tensor, packed: torch.Tensor, activation: Activation) -> torch.Tensor:
    """grad * f'(x) for grad (N,), the product in fp32, in the dtype of grad."""
    return (grad.float() * _derivative_of(packed, grad.numel(), activation)).to(grad.dtype)


def _derivative_of(packed: torch.Tensor, num_elements: int, activation: Activation) -> torch.Tensor:
    low, step = _fixed(activation, packed.device)
    return from_codes(unpack_nibbles(packed, num_elements), low, step)


def _fixed(activation: Activation, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    low, step = fixed_grid(activation)
    number = torch.empty((), dtype=torch.float32, device=device)
    return torch.full_like(number, low), torch.full_like(number, step)


def encode_swiglu(
    gate: torch.Tensor, up: torch.Tensor, group_size: int, seed: int | None, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges of up * silu'(gate), then of silu(gate); gate and up (R, C). Streams `stream`, `stream` + 1."""
    for_gate, for_up = swiglu_factors(gate.float(), up.float())
    return (
        *encode_groups(for_gate, group_size, seed, stream),
        *encode_groups(for_up, group_size, seed, stream + 1),
    )


def swiglu_backward(
    grad: torch.Tensor, payload: tuple[torch.Tensor, ...], group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up (R, C) from grad (R, C) and what `encode_swiglu` wrote; products in fp32."""
    cols = grad.shape[1]
    for_gate, for_up = (
        decode_groups(payload[place], payload[place + 1], cols, group_size, torch.float32) for place in (0, 2)
    )
    wide = grad.float()
    return (wide * for_gate).to(grad.dtype), (wide * for_up).to(grad.dtype)
