"""The kernels of the codecs; `codecs.py` launches them.

Random numbers and codes have the reference's bits: Philox is integer arithmetic, the encoder divides with one rounding,
and a code times a step of 16 significant bits is exact, so contraction to a fused multiply-add changes nothing.

One pass over the input in every kernel (a row longer than a tile is read twice, the second time from cache). Scratch
in device memory: none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _thresholds(block, seed, stream):
    """Uniform numbers (R, 4 C) of the Philox blocks (R, C) int64."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + stream.to(tl.uint32), zero)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _grid_step(low, high, LEVELS: tl.constexpr):
    """(high - low) / LEVELS, rounded up to 16 significant bits."""
    step = tl.div_rn(high - low, tl.zeros_like(low) + LEVELS)
    bits = step.to(tl.int32, bitcast=True)
    return ((bits + 0xFF) & -256).to(tl.float32, bitcast=True)


@triton.jit
def _codes(x, low, step, thresholds, LEVELS: tl.constexpr):
    """int32 codes of x: clamped on both sides, NaN at 0; low and step broadcast to x."""
    divisor = tl.where(step == 0.0, 1.0, step)
    place = tl.div_rn(x - low, tl.zeros_like(x) + divisor)
    place = tl.where(place == place, place, 0.0)
    place = tl.minimum(tl.maximum(place, 0.0), LEVELS)
    lower = place.to(tl.int32)
    return lower + (thresholds < place - lower.to(tl.float32)).to(tl.int32)


@triton.jit(do_not_specialize=["seed", "stream"])
def encode_rows_kernel(
    x_ptr,
    codes_ptr,
    ranges_ptr,
    num_rows,
    num_cols,
    seed,
    stream,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    """8-bit codes and a range per row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    low = tl.full((ROWS,), float("inf"), tl.float32)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    spoilt = tl.zeros((ROWS,), tl.int32)
    for tile in range(NUM_TILES):
        col = tile * COLS + tl.arange(0, COLS)
        mask = is_row[:, None] & (col < num_cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * num_cols + col[None, :], mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(low, tl.min(tl.where(mask, x, float("inf")), axis=1))
        high = tl.maximum(high, tl.max(tl.where(mask, x, float("-inf")), axis=1))
        spoilt = tl.maximum(spoilt, tl.max((mask & (x != x)).to(tl.int32), axis=1))
    low = tl.where(is_row, low, 0.0)
    low = tl.where(spoilt > 0, float("nan"), low)
    step = _grid_step(low, tl.where(is_row, high, 0.0), LEVELS)
    tl.store(ranges_ptr + 2 * row, low, mask=is_row)
    tl.store(ranges_ptr + 2 * row + 1, step, mask=is_row)
    blocks_per_row = (num_cols + 3) // 4
    for tile in range(NUM_TILES):
        col = tile * COLS + tl.arange(0, COLS)
        mask = is_row[:, None] & (col < num_cols)[None, :]
        offset = row[:, None] * num_cols + col[None, :]
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        block = row[:, None] * blocks_per_row + (tile * (COLS // 4) + tl.arange(0, COLS // 4))[None, :]
        codes = _codes(x, low[:, None], step[:, None], _thresholds(block, seed, stream), LEVELS)
        tl.store(codes_ptr + offset, codes.to(tl.uint8), mask=mask)


@triton.jit
def decode_rows_kernel(codes_ptr, ranges_ptr, out_ptr, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Values of 8-bit codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    is_row = row < num_rows
    mask = is_row[:, None] & (col < num_cols)[None, :]
    offset = row[:, None] * num_cols + col[None, :]
    low = tl.load(ranges_ptr + 2 * row, mask=is_row, other=0.0)
    step = tl.load(ranges_ptr + 2 * row + 1, mask=is_row, other=0.0)
    codes = tl.load(codes_ptr + offset, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + offset, (codes * step[:, None] + low[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pack(codes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) codes below 16 to (ROWS, COLS / 2) bytes, the even column in the low half."""
    even, odd = tl.split(tl.reshape(codes, (ROWS, COLS // 2, 2)))
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit
def _unpack(packed):
    """(R, C) bytes to (R, 2 C) codes in fp32."""
    packed = packed.to(tl.int32)
    return tl.interleave((packed & 15).to(tl.float32), (packed >> 4).to(tl.float32))


@triton.jit
def _elements(num_rows, num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Offsets and mask (ITEMS, GROUP) of this program's elements, and the number of each element quad's block."""
    row, start = _groups(num_cols, ITEMS, GROUP)
    col = start[:, None] + tl.arange(0, GROUP)[None, :]
    block = (row * ((num_cols + 3) // 4) + start // 4)[:, None] + tl.arange(0, GROUP // 4)[None, :]
    return row[:, None] * num_cols + col, (row < num_rows)[:, None] & (col < num_cols), block


@triton.jit
def _groups(num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Row and first column (ITEMS,) of this program's groups, int64."""
    groups = (num_cols + GROUP - 1) // GROUP
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    return item // groups, item % groups * GROUP


@triton.jit
def _stored(num_rows, num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Of this program's groups: offsets and mask (ITEMS, GROUP / 2) of the bytes, (ITEMS,) of the ranges."""
    row, start = _groups(num_cols, ITEMS, GROUP)
    half_cols = (num_cols + 1) // 2
    half_col = (start // 2)[:, None] + tl.arange(0, GROUP // 2)[None, :]
    is_item = row < num_rows
    item = tl.program_id(0).to(tl.int64) * ITEMS + tl.arange(0, ITEMS)
    return row[:, None] * half_cols + half_col, is_item[:, None] & (half_col < half_cols), 2 * item, is_item


@triton.jit(do_not_specialize=["seed", "stream"])
def encode_groups_kernel(
    x_ptr,
    codes_ptr,
    ranges_ptr,
    num_rows,
    num_cols,
    seed,
    stream,
    LEVELS: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """4-bit codes and a range per group of GROUP columns."""
    offset, mask, block = _elements(num_rows, num_cols, ITEMS, GROUP)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    byte, is_byte, place, is_place = _stored(num_rows, num_cols, ITEMS, GROUP)
    low = tl.min(tl.where(mask, x, float("inf")), axis=1)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    spoilt = tl.max((mask & (x != x)).to(tl.int32), axis=1) > 0
    low = tl.where(spoilt, float("nan"), tl.where(is_place, low, 0.0))
    step = _grid_step(low, tl.where(is_place, high, 0.0), LEVELS)
    codes = _codes(x, low[:, None], step[:, None], _thresholds(block, seed, stream), LEVELS)
    tl.store(codes_ptr + byte, _pack(tl.where(mask, codes, 0), ITEMS, GROUP), mask=is_byte)
    tl.store(ranges_ptr + place, low, mask=is_place)
    tl.store(ranges_ptr + place + 1, step, mask=is_place)


@triton.jit
def decode_groups_kernel(codes_ptr, ranges_ptr, out_ptr, num_rows, num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Values of 4-bit codes."""
    offset, mask, _ = _elements(num_rows, num_cols, ITEMS, GROUP)
    byte, is_byte, place, is_place = _stored(num_rows, num_cols, ITEMS, GROUP)
    low = tl.load(ranges_ptr + place, mask=is_place, other=0.0)
    step = tl.load(ranges_ptr + place + 1, mask=is_place, other=0.0)
    codes = _unpack(tl.load(codes_ptr + byte, mask=is_byte, other=0))
    tl.store(out_ptr + offset, (codes * step[:, None] + low[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
