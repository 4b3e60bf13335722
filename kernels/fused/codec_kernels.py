"""The kernels of the codecs; `codecs.py` launches them.

Random numbers and codes have the reference's bits: Philox is integer arithmetic, the encoder divides with one rounding,
and a code times a step of 16 significant bits is exact, so contraction to a fused multiply-add changes nothing. Where
a kernel computes silu or a derivative, its exp differs from torch's in the last digit, and a code may differ by one
where a random number falls between the two results: some elements in a million.

One pass over the input in every kernel (a row longer than a tile is read twice, the second time from cache). Scratch
in device memory: none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _thresholds(block, seed, stream, STOCHASTIC: tl.constexpr):
    """Uniform numbers (R, 4 C) of the Philox blocks (R, C) int64, or 0.5."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    if STOCHASTIC:
        c2 = zero + stream.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, low, high, c2, zero)
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        found = (words >> 8).to(tl.float32) * (1.0 / 16777216.0)
    else:
        half = zero.to(tl.float32) + 0.5
        found = tl.interleave(tl.interleave(half, half), tl.interleave(half, half))
    return found


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


@triton.jit
def _range(x, mask):
    """Smallest and largest (R,) of x (R, C) where the mask is set; NaN where there is one, 0 where none is set."""
    low = tl.min(tl.where(mask, x, float("inf")), axis=1)
    high = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    spoilt = tl.max((mask & (x != x)).to(tl.int32), axis=1) > 0
    empty = tl.max(mask.to(tl.int32), axis=1) == 0
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    return tl.where(spoilt, float("nan"), low), high


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
    STOCHASTIC: tl.constexpr,
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
        codes = _codes(x, low[:, None], step[:, None], _thresholds(block, seed, stream, STOCHASTIC), LEVELS)
        tl.store(codes_ptr + offset, codes.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["seed", "stream"])
def encode_given_kernel(
    x_ptr,
    codes_ptr,
    ranges_ptr,
    num_rows,
    num_cols,
    num_ranges,
    seed,
    stream,
    LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """8-bit codes under ranges that are given; row r takes range r % num_ranges."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * COLS
    col = start + tl.arange(0, COLS)
    is_row = row < num_rows
    mask = is_row[:, None] & (col < num_cols)[None, :]
    offset = row[:, None] * num_cols + col[None, :]
    low = tl.load(ranges_ptr + 2 * (row % num_ranges), mask=is_row, other=0.0)
    step = tl.load(ranges_ptr + 2 * (row % num_ranges) + 1, mask=is_row, other=0.0)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    block = row[:, None] * ((num_cols + 3) // 4) + (start // 4 + tl.arange(0, COLS // 4))[None, :]
    codes = _codes(x, low[:, None], step[:, None], _thresholds(block, seed, stream, STOCHASTIC), LEVELS)
    tl.store(codes_ptr + offset, codes.to(tl.uint8), mask=mask)


@triton.jit
def decode_rows_kernel(
    codes_ptr, ranges_ptr, out_ptr, num_rows, num_cols, num_ranges, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Values of 8-bit codes; row r takes range r % num_ranges."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    is_row = row < num_rows
    mask = is_row[:, None] & (col < num_cols)[None, :]
    offset = row[:, None] * num_cols + col[None, :]
    low = tl.load(ranges_ptr + 2 * (row % num_ranges), mask=is_row, other=0.0)
    step = tl.load(ranges_ptr + 2 * (row % num_ranges) + 1, mask=is_row, other=0.0)
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


@triton.jit
def _store_groups(
    x,
    mask,
    thresholds,
    codes_ptr,
    ranges_ptr,
    num_rows,
    num_cols,
    LEVELS: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """4-bit codes and ranges of groups x (ITEMS, GROUP)."""
    low, high = _range(x, mask)
    step = _grid_step(low, high, LEVELS)
    codes = tl.where(mask, _codes(x, low[:, None], step[:, None], thresholds, LEVELS), 0)
    byte, is_byte, place, is_place = _stored(num_rows, num_cols, ITEMS, GROUP)
    tl.store(codes_ptr + byte, _pack(codes, ITEMS, GROUP), mask=is_byte)
    tl.store(ranges_ptr + place, low, mask=is_place)
    tl.store(ranges_ptr + place + 1, step, mask=is_place)


@triton.jit
def _load_groups(codes_ptr, ranges_ptr, num_rows, num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Values (ITEMS, GROUP) fp32 of groups."""
    byte, is_byte, place, is_place = _stored(num_rows, num_cols, ITEMS, GROUP)
    low = tl.load(ranges_ptr + place, mask=is_place, other=0.0)
    step = tl.load(ranges_ptr + place + 1, mask=is_place, other=0.0)
    codes = _unpack(tl.load(codes_ptr + byte, mask=is_byte, other=0))
    return codes * step[:, None] + low[:, None]


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
    STOCHASTIC: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """4-bit codes and a range per group of GROUP columns."""
    offset, mask, block = _elements(num_rows, num_cols, ITEMS, GROUP)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    random = _thresholds(block, seed, stream, STOCHASTIC)
    _store_groups(x, mask, random, codes_ptr, ranges_ptr, num_rows, num_cols, LEVELS, ITEMS, GROUP)


@triton.jit
def decode_groups_kernel(codes_ptr, ranges_ptr, out_ptr, num_rows, num_cols, ITEMS: tl.constexpr, GROUP: tl.constexpr):
    """Values of 4-bit codes."""
    offset, mask, _ = _elements(num_rows, num_cols, ITEMS, GROUP)
    values = _load_groups(codes_ptr, ranges_ptr, num_rows, num_cols, ITEMS, GROUP)
    tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed", "stream"])
def encode_swiglu_kernel(
    gate_ptr,
    up_ptr,
    gate_codes_ptr,
    gate_ranges_ptr,
    up_codes_ptr,
    up_ranges_ptr,
    num_rows,
    num_cols,
    seed,
    stream,
    LEVELS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """4-bit codes of up * silu'(gate) (for gate's gradient) and of silu(gate) (for up's)."""
    offset, mask, block = _elements(num_rows, num_cols, ITEMS, GROUP)
    gate = tl.load(gate_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    factor = up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    random = _thresholds(block, seed, stream, STOCHASTIC)
    _store_groups(factor, mask, random, gate_codes_ptr, gate_ranges_ptr, num_rows, num_cols, LEVELS, ITEMS, GROUP)
    random = _thresholds(block, seed, stream + 1, STOCHASTIC)
    _store_groups(gate * sigmoid, mask, random, up_codes_ptr, up_ranges_ptr, num_rows, num_cols, LEVELS, ITEMS, GROUP)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr,
    gate_codes_ptr,
    gate_ranges_ptr,
    up_codes_ptr,
    up_ranges_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    num_rows,
    num_cols,
    ITEMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients of gate and up: the output's gradient times either decoded factor."""
    offset, mask, _ = _elements(num_rows, num_cols, ITEMS, GROUP)
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    factor = _load_groups(gate_codes_ptr, gate_ranges_ptr, num_rows, num_cols, ITEMS, GROUP)
    tl.store(gate_grad_ptr + offset, (grad * factor).to(gate_grad_ptr.dtype.element_ty), mask=mask)
    factor = _load_groups(up_codes_ptr, up_ranges_ptr, num_rows, num_cols, ITEMS, GROUP)
    tl.store(up_grad_ptr + offset, (grad * factor).to(up_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _erf(x):
    """erf by a polynomial times exp(-x^2) (Abramowitz and Stegun 7.1.26); 1.5e-7 off at most."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    found = 1.0 - series * tl.exp(-size * size)
    return tl.where(x < 0.0, -found, found)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    """f'(x); ACTIVATION is Activation.value."""
    if ACTIVATION == 0:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        found = sigmoid * (1.0 + x * (1.0 - sigmoid))
    else:
        x = tl.minimum(tl.maximum(x, -20.0), 20.0)
        if ACTIVATION == 1:
            # (1 + tanh u) / 2 = sigmoid(2 u), and half of 1 - tanh^2 u is twice s (1 - s).
            s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
            found = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            density = tl.exp(-0.5 * x * x) * 0.3989422804014327
            found = 0.5 * (1.0 + _erf(x * 0.7071067811865476)) + x * density
    return found


@triton.jit(do_not_specialize=["seed", "stream"])
def encode_derivative_kernel(
    x_ptr,
    codes_ptr,
    num_elements,
    seed,
    stream,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    LEVELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
):
    """4-bit codes of f'(x) on a fixed grid."""
    start = tl.program_id(0).to(tl.int64) * TILE
    place = start + tl.arange(0, TILE)[None, :]
    mask = place < num_elements
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    block = start // 4 + tl.arange(0, TILE // 4)[None, :]
    random = _thresholds(block, seed, stream, STOCHASTIC)
    low, step = tl.full((1, 1), LOW, tl.float32), tl.full((1, 1), STEP, tl.float32)
    codes = tl.where(mask, _codes(_derivative(x, ACTIVATION), low, step, random, LEVELS), 0)
    half = start // 2 + tl.arange(0, TILE // 2)[None, :]
    tl.store(codes_ptr + half, _pack(codes, 1, TILE), mask=half < (num_elements + 1) // 2)


@triton.jit
def decode_derivative_kernel(
    codes_ptr,
    grad_ptr,
    out_ptr,
    num_elements,
    LOW: tl.constexpr,
    STEP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """f'(x), or the output's gradient times it."""
    start = tl.program_id(0).to(tl.int64) * TILE
    half = start // 2 + tl.arange(0, TILE // 2)[None, :]
    codes = _unpack(tl.load(codes_ptr + half, mask=half < (num_elements + 1) // 2, other=0))
    low, step = tl.full((1, 1), LOW, tl.float32), tl.full((1, 1), STEP, tl.float32)
    found = codes * step + low
    place = start + tl.arange(0, TILE)[None, :]
    mask = place < num_elements
    if HAS_GRAD:
        found = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * found
    tl.store(out_ptr + place, found.to(out_ptr.dtype.element_ty), mask=mask)
