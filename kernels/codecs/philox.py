"""Replayable random numbers: Philox 4x32-10 (Salmon et al., SC 2011) over a seed and an element's place.

No state, and torch's own generators are never touched: the same seed, stream and place give the same number on every
device, in torch and in Triton, because all of it is integer arithmetic. In a tensor of `cols` columns, the element at
(row, col) takes word col % 4 of the block numbered row * ceil(cols / 4) + col // 4; counter and key are

    counter = (block, low 32 bits; block, high 32 bits; stream; 0)      key = (seed, low; seed, high)
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
SEED_END = 1 << 63
_MASK = 0xFFFFFFFF
_SEED_STREAM = 0x5EED  # tells the counters of `derive_seed` from those of codes
_BLOCKS_AT_ONCE = 1 << 14  # bounds the int64 scratch of `uniforms` to a MiB, which stays in the cache
Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def check_seed(seed: int) -> None:
    """Raise ValueError unless 0 <= seed < 2^63 (an int; a bool or a float is refused)."""
    if type(seed) is not int or not 0 <= seed < SEED_END:
        raise ValueError(f"seed={seed!r}: an integer from 0 to 2^63 - 1")


def derive_seed(seed: int, *parts: int) -> int:
    """A seed for one call, from the run's seed and the values that identify the call.

    Give step, micro-batch, layer and tensor: two codes under one seed have the same errors, which do not average out.

    Args:
        parts: integers from 0 to 2^63 - 1; their order counts.

    Raises:
        ValueError: a seed or a part out of range, or no part.
    """
    check_seed(seed)
    if not parts:
        raise ValueError("parts: none given; give values that identify this call (step, layer, tensor)")
    for depth, part in enumerate(parts):
        check_seed(part)
        low, high, _, _ = philox_of_integers((part & _MASK, part >> 32, _SEED_STREAM, depth + 1), seed)
        seed = (high << 32 | low) % SEED_END
    return seed


def philox_of_integers(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """The four 32-bit words of one counter of four 32-bit words under a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, key >> 32
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = second >> 32 ^ c1 ^ k0, second & _MASK, first >> 32 ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def philox(blocks: torch.Tensor, seed: int, stream: int) -> Words:
    """The four 32-bit words of every block, in int64.

    Args:
        blocks: int64, any shape, not negative.
        stream: 0 <= stream < 2^32.
    """
    c0, c1 = blocks & _MASK, blocks >> 32
    c2, c3 = torch.full_like(blocks, stream), torch.zeros_like(blocks)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(ROUNDS):
        high_0, low_0 = _multiply(c0, MULTIPLIERS[0])
        high_1, low_1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low half of a * multiplier. With multiplier - 2^32 in its place the product fits a signed int64."""
    product = a * (multiplier - (1 << 32))
    return (product >> 32) + a, product & _MASK


def uniforms(rows: int, cols: int, seed: int, stream: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(rows, cols) fp32 uniform on the multiples of 2^-24 in [0, 1), each a function of seed, stream and place."""
    blocks_per_row = -(-cols // 4)
    out = torch.empty(rows * blocks_per_row, 4, dtype=torch.float32, device=device)
    for start in range(0, len(out), _BLOCKS_AT_ONCE):
        stop = min(start + _BLOCKS_AT_ONCE, len(out))
        words = philox(torch.arange(start, stop, device=device), seed, stream)
        out[start:stop] = torch.stack([word >> 8 for word in words], dim=-1) * 2.0**-24
    return out.view(rows, 4 * blocks_per_row)[:, :cols]
