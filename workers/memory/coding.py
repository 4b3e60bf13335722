"""Rows of a tensor in a lossy codec, as bytes: what a plan with `cuts.codec` holds of them."""

from __future__ import annotations

import torch

from headrace.kernels.api import CodecName, Encoded, Rounding, build_codec


def encode_rows(codec: CodecName, rows: torch.Tensor, *, seed: int, stream: int) -> torch.Tensor:
    """(B, n, width) to (B, n, bytes) uint8, as many as stash_bytes says of the codec: a row's ranges, then its codes.

    Rounding is stochastic: what is decoded is right on average. NaN and infinities come back as NaN or infinities: the
    step finds them in its gradient norm.

    Args:
        seed, stream: see Codec.encode.
    """
    found = build_codec(codec, Rounding.stochastic, check_finite=False).encode(rows, seed=seed, stream=stream)
    codes, ranges = found.payload
    return torch.cat((ranges.flatten(2).view(torch.uint8), codes), dim=2)


def decode_rows(codec: CodecName, held: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of encode_rows, up to a step of the codec: (B, n, bytes) to (B, n, width) in `dtype`."""
    num_codes = width if codec is CodecName.eight_bit_token else -(-width // 2)
    ranges, codes = held.split((held.shape[2] - num_codes, num_codes), dim=2)
    shape = (*held.shape[:2], width)
    groups = (-1, 2) if codec is CodecName.four_bit_group else (2,)
    payload = codes.contiguous(), ranges.contiguous().view(torch.float32).unflatten(2, groups)
    return build_codec(codec).decode(Encoded(codec, payload, shape, dtype, Rounding.stochastic, 0, 0))
