"""The codecs' encode and decode by Triton: the functions of `codecs/reference.py`. See `codec_kernels.py`."""

from __future__ import annotations

import torch
import triton

from headrace.kernels.codecs.config import GROUP_SIZE
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, FOUR_BIT_LEVELS
from headrace.kernels.fused import codec_kernels as kernels

# Elements per program: 16 and 8 a thread with 4 warps, so that all stays in registers and several blocks fit an SM.
TILE_ELEMENTS, GROUP_TILE_ELEMENTS = 2048, 1024
MAX_TILE_COLS = 1024
GROUP_TILE = {"ITEMS": GROUP_TILE_ELEMENTS // GROUP_SIZE, "GROUP": GROUP_SIZE}


def tile_shape(cols: int) -> tuple[int, int]:
    """Rows and columns of a tile: powers of two, at least 4 columns (one block of random numbers)."""
    tile_cols = min(max(triton.next_power_of_2(cols), 4), MAX_TILE_COLS)
    return TILE_ELEMENTS // tile_cols, tile_cols


def encode_eight_bit(x: torch.Tensor, seed: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, C) uint8 and ranges (R, 1, 2) of x (R, C)."""
    rows, cols = x.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=x.device)
    ranges = torch.empty(rows, 1, 2, dtype=torch.float32, device=x.device)
    tile_rows, tile_cols = tile_shape(cols)
    with torch.cuda.device_of(x):
        kernels.encode_rows_kernel[(triton.cdiv(rows, tile_rows),)](
            x,
            codes,
            ranges,
            rows,
            cols,
            seed,
            stream,
            LEVELS=EIGHT_BIT_LEVELS,
            ROWS=tile_rows,
            COLS=tile_cols,
            NUM_TILES=triton.cdiv(cols, tile_cols),
        )
    return codes, ranges


def decode_eight_bit(codes: torch.Tensor, ranges: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of what `encode_eight_bit` wrote."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    tile_rows, tile_cols = tile_shape(cols)
    with torch.cuda.device_of(codes):
        kernels.decode_rows_kernel[(triton.cdiv(len(codes), tile_rows), triton.cdiv(cols, tile_cols))](
            codes, ranges, out, *out.shape, ROWS=tile_rows, COLS=tile_cols
        )
    return out


def encode_four_bit(x: torch.Tensor, seed: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, ceil(C / 2)) uint8 and ranges (R, ceil(C / GROUP_SIZE), 2) of x (R, C)."""
    rows, cols = x.shape
    codes = torch.empty(rows, -(-cols // 2), dtype=torch.uint8, device=x.device)
    ranges = torch.empty(rows, -(-cols // GROUP_SIZE), 2, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        kernels.encode_groups_kernel[_group_grid(ranges)](
            x, codes, ranges, rows, cols, seed, stream, LEVELS=FOUR_BIT_LEVELS, **GROUP_TILE
        )
    return codes, ranges


def decode_four_bit(packed: torch.Tensor, ranges: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values (R, C) of what `encode_four_bit` wrote."""
    out = torch.empty(packed.shape[0], cols, dtype=dtype, device=packed.device)
    with torch.cuda.device_of(packed):
        kernels.decode_groups_kernel[_group_grid(ranges)](packed, ranges, out, *out.shape, **GROUP_TILE)
    return out


def _group_grid(ranges: torch.Tensor) -> tuple[int]:
    return (triton.cdiv(ranges.shape[0] * ranges.shape[1], GROUP_TILE["ITEMS"]),)
