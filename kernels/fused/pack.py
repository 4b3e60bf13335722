"""Staging blocks in Triton: one launch moves all tensors of a token range. `kernels/pack.py` checks what comes here.

The range of a tensor is cut into strips: rows of `run` elements, `stride` elements apart, which lie end to end in the
block. A table on the device has one line per strip; a program looks up the strip that its tile belongs to. Bits are
copied as integers, in units of up to 8 bytes, so every dtype is copied; casts go through fp32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from headrace.kernels.pack_layout import ITEM_BYTES, PackLayout, Piece

TILE, NUM_WARPS = 1024, 4
# Places inside a row are 32 bits wide in the kernel: longer rows become several strips.
MAX_RUN = 1 << 30
NUM_COLUMNS: tl.constexpr = tl.constexpr(8)
# How a strip is moved: by the size of its unit, or from and to which dtype (tensor, block).
COPY_KINDS = {8: 0, 4: 1, 2: 2, 1: 3}
CAST_KINDS = {
    ("float32", "bfloat16"): 4,
    ("bfloat16", "float32"): 5,
    ("float32", "float16"): 6,
    ("float16", "float32"): 7,
    ("bfloat16", "float16"): 8,
    ("float16", "bfloat16"): 9,
}


class Strip(NamedTuple):
    """Rows of one tensor that lie end to end in the block; a line of the kernel's table.

    first_tile: the first program that works on it. address: of its first element. offset_bytes: in the block.
    stride, run, num_elements: distance and length of the rows and size of the strip, in its unit. padded: num_elements,
    and behind a piece's last strip the gap to the next piece. kind: see COPY_KINDS and CAST_KINDS.
    """

    first_tile: int
    address: int
    offset_bytes: int
    stride: int
    run: int
    num_elements: int
    padded: int
    kind: int


def pack(tensors: Mapping[str, torch.Tensor], layout: PackLayout, begin: int, out: torch.Tensor) -> None:
    """Fill `out` with tokens [begin, begin + layout.num_tokens) of the tensors; see kernels.pack.pack."""
    _launch(tensors, layout, begin, out, is_unpack=False)


def unpack(block: torch.Tensor, layout: PackLayout, begin: int, out: Mapping[str, torch.Tensor]) -> None:
    """Write the pieces of `block` into tokens [begin, begin + layout.num_tokens) of `out`; see kernels.pack.unpack."""
    _launch(out, layout, begin, block, is_unpack=True)


def _launch(
    tensors: Mapping[str, torch.Tensor], layout: PackLayout, begin: int, block: torch.Tensor, *, is_unpack: bool
) -> None:
    strips = tuple(strips_of(tensors, layout, begin))
    num_tiles = strips[-1].first_tile + triton.cdiv(strips[-1].padded, TILE)
    with torch.cuda.device_of(block):
        stream = torch.cuda.current_stream().cuda_stream if block.is_cuda else 0
        table = _table(strips, block.device, stream)
        _move_strips[(num_tiles,)](table, block, len(table), TILE, is_unpack, num_warps=NUM_WARPS)


@functools.lru_cache(maxsize=256)
def _table(strips: tuple[Strip, ...], device: torch.device, stream: int) -> torch.Tensor:
    """The strips on the device, padded to a power of two; a call that repeats finds its table there.

    The stream is part of the key: a table is read on the stream that filled it, so nothing has to wait.
    """
    never = Strip(1 << 62, 0, 0, 0, 1, 0, 0, 0)
    padding = (never,) * (triton.next_power_of_2(max(8, len(strips))) - len(strips))
    table = torch.tensor(strips + padding, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def strips_of(tensors: Mapping[str, torch.Tensor], layout: PackLayout, begin: int) -> Iterator[Strip]:
    """The strips of all pieces in the block's order."""
    ends = (*layout.offsets_bytes[1:], layout.total_bytes)
    tile = 0
    for piece, offset, size, end in zip(layout.pieces, layout.offsets_bytes, layout.piece_bytes, ends, strict=True):
        for rows in _rows(piece, tensors[piece.name], layout.num_tokens, begin, offset):
            strip = _in_units(piece, rows, tile, end if rows.end_bytes == offset + size else rows.end_bytes)
            yield strip
            tile += triton.cdiv(strip.padded, TILE)


class _Rows(NamedTuple):
    """`num_rows` of `run` elements, `stride` apart from `address`; in the block from offset_bytes to end_bytes."""

    address: int
    stride: int
    run: int
    num_rows: int
    offset_bytes: int
    end_bytes: int


def _rows(piece: Piece, tensor: torch.Tensor, num_tokens: int, begin: int, offset_bytes: int) -> Iterator[_Rows]:
    dim, inner = piece.token_dim, piece.num_inner
    token_stride = tensor.stride(dim)
    first = tensor.data_ptr() + begin * token_stride * tensor.element_size()
    starts = _outer_starts(tensor, dim)
    staged_bytes = ITEM_BYTES[piece.staged]
    if token_stride != inner:
        groups = [(start, token_stride, inner, num_tokens) for start in starts]
    elif len(set(steps := [b - a for a, b in itertools.pairwise(starts)])) <= 1:
        groups = [(starts[0], steps[0] if steps else 0, num_tokens * inner, len(starts))]
    else:
        groups = [(start, 0, num_tokens * inner, 1) for start in starts]
    for group in groups:
        for start, stride, run, count in _short_rows(*group):
            end_bytes = offset_bytes + run * count * staged_bytes
            yield _Rows(first + start * tensor.element_size(), stride, run, count, offset_bytes, end_bytes)
            offset_bytes = end_bytes


def _outer_starts(tensor: torch.Tensor, dim: int) -> list[int]:
    """In elements, the start of every index of the dimensions before the tokens."""
    starts = [0]
    for size, stride in zip(tensor.shape[:dim], tensor.stride()[:dim], strict=True):
        starts = [start + i * stride for start in starts for i in range(size)]
    return starts


def _short_rows(start: int, stride: int, run: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """The same elements in the same order, with runs of at most MAX_RUN."""
    if run <= MAX_RUN:
        yield start, stride, run, count
        return
    for row in range(count):
        for place in range(0, run, MAX_RUN):
            yield start + row * stride + place, 0, min(MAX_RUN, run - place), 1


def _in_units(piece: Piece, rows: _Rows, tile: int, end_bytes: int) -> Strip:
    """The strip in the largest unit that divides everything about it, or in elements where it is cast."""
    item = ITEM_BYTES[piece.dtype]
    stride = rows.stride if rows.num_rows > 1 else rows.run
    if piece.is_cast:
        unit, block_unit, kind = item, ITEM_BYTES[piece.staged], CAST_KINDS[piece.dtype, piece.staged]
    else:
        unit = block_unit = math.gcd(rows.address, stride * item, rows.run * item, rows.offset_bytes, 8)
        kind = COPY_KINDS[unit]
    return Strip(
        tile,
        rows.address,
        rows.offset_bytes,
        stride * item // unit,
        rows.run * item // unit,
        rows.run * rows.num_rows * item // unit,
        (end_bytes - rows.offset_bytes) // block_unit,
        kind,
    )


@triton.jit
def _move_strips(table, block, NUM_STRIPS: tl.constexpr, TILE: tl.constexpr, IS_UNPACK: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    first_tiles = tl.load(table + tl.arange(0, NUM_STRIPS) * NUM_COLUMNS)
    line = table + (tl.sum((first_tiles <= tile).to(tl.int32), 0) - 1) * NUM_COLUMNS
    begin = (tile - tl.load(line)) * TILE
    kind = tl.load(line + 7)
    if kind == 0:
        _move(line, block, begin, tl.int64, tl.int64, TILE, IS_UNPACK)
    elif kind == 1:
        _move(line, block, begin, tl.int32, tl.int32, TILE, IS_UNPACK)
    elif kind == 2:
        _move(line, block, begin, tl.int16, tl.int16, TILE, IS_UNPACK)
    elif kind == 3:
        _move(line, block, begin, tl.int8, tl.int8, TILE, IS_UNPACK)
    elif kind == 4:
        _move(line, block, begin, tl.float32, tl.bfloat16, TILE, IS_UNPACK)
    elif kind == 5:
        _move(line, block, begin, tl.bfloat16, tl.float32, TILE, IS_UNPACK)
    elif kind == 6:
        _move(line, block, begin, tl.float32, tl.float16, TILE, IS_UNPACK)
    elif kind == 7:
        _move(line, block, begin, tl.float16, tl.float32, TILE, IS_UNPACK)
    elif kind == 8:
        _move(line, block, begin, tl.bfloat16, tl.float16, TILE, IS_UNPACK)
    else:
        _move(line, block, begin, tl.float16, tl.bfloat16, TILE, IS_UNPACK)


@triton.jit
def _move(
    line,
    block,
    begin,
    TENSOR: tl.constexpr,
    STAGED: tl.constexpr,
    TILE: tl.constexpr,
    IS_UNPACK: tl.constexpr,
):
    """Elements [begin, begin + TILE) of a strip, from the tensor to the block or back."""
    tensor = tl.load(line + 1).to(tl.pointer_type(TENSOR))
    staged = (block.to(tl.int64) + tl.load(line + 2)).to(tl.pointer_type(STAGED))
    stride, run, count = tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    lanes = tl.arange(0, TILE)
    row = begin // run
    # Below MAX_RUN + TILE: the division that every lane makes is one of 32 bits.
    column = (begin - row * run).to(tl.int32) + lanes
    places = row * stride + column
    if stride != run:
        places += (column // run.to(tl.int32)).to(tl.int64) * (stride - run)
    tensor += places
    staged += begin + lanes
    there = begin + lanes < count
    if IS_UNPACK:
        value = tl.load(staged, mask=there, other=0)
        if STAGED != TENSOR:
            value = value.to(tl.float32).to(TENSOR)
        tl.store(tensor, value, mask=there)
    else:
        value = tl.load(tensor, mask=there, other=0)
        if STAGED != TENSOR:
            value = value.to(tl.float32).to(STAGED)
        # Behind the last element of a piece, zeros up to the next one.
        tl.store(staged, value, mask=begin + lanes < tl.load(line + 6))
