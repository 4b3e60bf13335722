"""The codecs' encode and decode by Triton: the functions of `codecs/reference.py`. See `codec_kernels.py`."""

from __future__ import annotations

import torch
import triton

from headrace.kernels.codecs.activations import Activation, fixed_grid
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, FOUR_BIT_LEVELS
from headrace.kernels.fused import codec_kernels as kernels

# Elements per program: 16 and 8 a thread with 4 warps, so that all stays in registers and several blocks fit an SM.
TILE_ELEMENTS, GROUP_TILE_ELEMENTS = 2048, 1024
MAX_TILE_COLS = 1024


def tile_shape(cols: int) -> tuple[int, int]:
    """Rows and columns of a tile: powers of two, at least 4 columns (one block of random numbers)."""
    tile_cols = min(max(triton.next_power_of_2(cols), 4), MAX_TILE_COLS)
    return TILE_ELEMENTS // tile_cols, tile_cols


def encode_rows(x: torch.Tensor, seed: int | None, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes (R, C) uint8 and ranges (R, 2) of x (R, C), a range per row."""
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return codes, torch.zeros(rows, 2, dtype=torch.float32, device=x.device)
    ranges = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
    tile_rows, tile_cols = tile_shape(cols)
    with torch.cuda.device_of(x):
        kernels.encode_rows_kernel[(triton.cdiv(rows, tile_rows),)](
            x,
            codes,
            ranges,
            rows,
            cols,
            *_random(seed, stream),
            LEVELS=EIGHT_BIT_LEVELS,
            STOCHASTIC=seed is not None,
            ROWS=tile_rows,
            COLS=tile_cols,
            NUM_TILES=triton.cdiv(cols, tile_cols),
        )
    return codes, ranges


def encode_given(x: torch.Tensor, ranges: torch.Tensor, seed: int | None, stream: int) -> torch.Tensor:
    """8-bit codes (R, C) uint8 of x (R, C); row r takes ranges[r % G] of ranges (G, 2), and is clamped to it."""
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    if x.numel() == 0:
        return codes
    tile_rows, tile_cols = tile_shape(cols)
    with torch.cuda.device_of(x):
        kernels.encode_given_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(cols, tile_cols))](
            x,
            codes,
            ranges,
            rows,
            cols,
            len(ranges),
            *_random(seed, stream),
            LEVELS=EIGHT_BIT_LEVELS,
            STOCHASTIC=seed is not None,
            ROWS=tile_rows,
            COLS=tile_cols,
        )
    return codes


def decode_rows(codes: torch.Tensor, ranges: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of 8-bit codes (R, C); row r takes ranges[r % G] of ranges (G, 2)."""
    rows, cols = codes.shape
    out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    tile_rows, tile_cols = tile_shape(cols)
    with torch.cuda.device_of(codes):
        kernels.decode_rows_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(cols, tile_cols))](
            codes, ranges, out, rows, cols, len(ranges), ROWS=tile_rows, COLS=tile_cols
        )
    return out


def encode_groups(x: torch.Tensor, group_size: int, seed: int | None, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit codes (R, ceil(C / 2)) uint8 and ranges (R, ceil(C / group_size), 2) of x (R, C)."""
    codes, ranges = _empty_groups(x, group_size)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            kernels.encode_groups_kernel[_group_grid(x, group_size)](
                x,
                codes,
                ranges,
                *x.shape,
                *_random(seed, stream),
                LEVELS=FOUR_BIT_LEVELS,
                STOCHASTIC=seed is not None,
                **_group_tile(group_size),
            )
    return codes, ranges


def decode_groups(
    packed: torch.Tensor, ranges: torch.Tensor, cols: int, group_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Values (R, C) of what `encode_groups` wrote."""
    out = torch.empty(packed.shape[0], cols, dtype=dtype, device=packed.device)
    if out.numel() > 0:
        with torch.cuda.device_of(packed):
            kernels.decode_groups_kernel[_group_grid(out, group_size)](
                packed, ranges, out, *out.shape, **_group_tile(group_size)
            )
    return out


def encode_swiglu(
    gate: torch.Tensor, up: torch.Tensor, group_size: int, seed: int | None, stream: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and ranges of up * silu'(gate), then of silu(gate); gate and up (R, C). Streams `stream`, `stream` + 1."""
    found = (*_empty_groups(gate, group_size), *_empty_groups(gate, group_size))
    if gate.numel() > 0:
        with torch.cuda.device_of(gate):
            kernels.encode_swiglu_kernel[_group_grid(gate, group_size)](
                gate,
                up,
                *found,
                *gate.shape,
                *_random(seed, stream),
                LEVELS=FOUR_BIT_LEVELS,
                STOCHASTIC=seed is not None,
                **_group_tile(group_size),
            )
    return found


def swiglu_backward(
    grad: torch.Tensor, payload: tuple[torch.Tensor, ...], group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up (R, C) from grad (R, C) and what `encode_swiglu` wrote; products in fp32."""
    found = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel() > 0:
        with torch.cuda.device_of(grad):
            kernels.swiglu_backward_kernel[_group_grid(grad, group_size)](
                grad, *payload, *found, *grad.shape, **_group_tile(group_size)
            )
    return found


def encode_derivative(x: torch.Tensor, activation: Activation, seed: int | None, stream: int) -> torch.Tensor:
    """4-bit codes (ceil(N / 2),) uint8 of f'(x) for x (N,), on the fixed grid of the activation."""
    codes = torch.empty(-(-x.numel() // 2), dtype=torch.uint8, device=x.device)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            kernels.encode_derivative_kernel[(triton.cdiv(x.numel(), TILE_ELEMENTS),)](
                x,
                codes,
                x.numel(),
                *_random(seed, stream),
                **_fixed(activation),
                LEVELS=FOUR_BIT_LEVELS,
                ACTIVATION=activation.value,
                STOCHASTIC=seed is not None,
                TILE=TILE_ELEMENTS,
            )
    return codes


def decode_derivative(
    packed: torch.Tensor, num_elements: int, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    """f'(x) (N,) of what `encode_derivative` wrote."""
    out = torch.empty(num_elements, dtype=dtype, device=packed.device)
    return _decode_derivative(packed, out, out, activation, has_grad=False)


def derivative_backward(grad: torch.Tensor, packed: torch.Tensor, activation: Activation) -> torch.Tensor:
    """grad * f'(x) for grad (N,), the product in fp32, in the dtype of grad."""
    return _decode_derivative(packed, grad, torch.empty_like(grad), activation, has_grad=True)


def _decode_derivative(
    packed: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, activation: Activation, *, has_grad: bool
) -> torch.Tensor:
    if out.numel() > 0:
        with torch.cuda.device_of(packed):
            kernels.decode_derivative_kernel[(triton.cdiv(out.numel(), TILE_ELEMENTS),)](
                packed, grad, out, out.numel(), **_fixed(activation), HAS_GRAD=has_grad, TILE=TILE_ELEMENTS
            )
    return out


def _random(seed: int | None, stream: int) -> tuple[int, int]:
    """Seed and stream as the kernels take them; without a seed they do not look at it."""
    return (0 if seed is None else seed), stream


def _empty_groups(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    codes = torch.empty(rows, -(-cols // 2), dtype=torch.uint8, device=x.device)
    return codes, torch.empty(rows, -(-cols // group_size), 2, dtype=torch.float32, device=x.device)


def _group_grid(x: torch.Tensor, group_size: int) -> tuple[int]:
    rows, cols = x.shape
    return (triton.cdiv(rows * -(-cols // group_size), GROUP_TILE_ELEMENTS // group_size),)


def _group_tile(group_size: int) -> dict[str, int]:
    return {"ITEMS": GROUP_TILE_ELEMENTS // group_size, "GROUP": group_size}


def _rows_tile(cols: int) -> dict[str, int]:
    return dict(zip(("ROWS", "COLS"), tile_shape(cols), strict=True))


def _fixed(activation: Activation) -> dict[str, float]:
    return dict(zip(("LOW", "STEP"), fixed_grid(activation), strict=True))


_KEPT = {"codes_ptr": "*u8", "ranges_ptr": "*fp32"}
_KEPT_TWICE = {f"{side}_{name}": kind for side in ("gate", "up") for name, kind in _KEPT.items()}
_SIZES = {"num_rows": "i64", "num_cols": "i64"}
_WIDE = 3 * MAX_TILE_COLS
