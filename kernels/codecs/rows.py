"""Rows of a tensor in a lossy codec, as bytes: what a plan with `cuts.codec` holds of them.

A range is that from smallest to largest value. It is taken per row (the granularity of tokens) or per group of
neighbours (that of GACT and ActNN), so one outlier spoils its own row or group only.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import CodecName, stash_bytes
from headrace.kernels.codecs.philox import check_seed
from headrace.kernels.dispatch import choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM_END = 1 << 32


def encode_rows(
    codec: CodecName, x: torch.Tensor, *, seed: int, stream: int, backend: Backend = Backend.auto
) -> torch.Tensor:
    """(..., width) to (..., stash_bytes) uint8: a row's ranges, then its codes.

    Rounding is stochastic: what is decoded is right on average. A row (a group) with a NaN or an infinity, or whose
    range fp32 does not hold, and no other, decodes to NaN or infinities: a step finds them in its gradient norm.

    Args:
        x: fp32, bf16 or fp16; not changed.
        seed: 0 <= seed < 2^63, different for every call (`derive_seed`).
        stream: 0 <= stream < 2^32; tells apart tensors that are encoded under one seed.

    Raises:
        ValueError: the dtype, a seed or stream out of range, a backend that cannot.
    """
    _check_dtype(x.dtype)
    check_seed(seed)
    if type(stream) is not int or not 0 <= stream < STREAM_END:
        raise ValueError(f"stream={stream!r}: an integer from 0 to 2^32 - 1")
    rows = x.detach().contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])
    form = _forms("encode", backend, x.device, x.dtype)
    encode = form.encode_eight_bit if codec is CodecName.eight_bit_token else form.encode_four_bit
    codes, ranges = encode(rows, seed, stream)
    held = torch.cat((ranges.flatten(1).view(torch.uint8), codes), dim=1)
    return held.view(*x.shape[:-1], stash_bytes(codec, x.shape[-1]))


def decode_rows(
    codec: CodecName, held: torch.Tensor, width: int, dtype: torch.dtype, *, backend: Backend = Backend.auto
) -> torch.Tensor:
    """The inverse of encode_rows, up to a step of the codec: (..., stash_bytes) to (..., width) in `dtype`.

    Raises:
        ValueError: bytes that no row of this width has, the dtype, a backend that cannot.
    """
    _check_dtype(dtype)
    if held.dtype is not torch.uint8 or held.shape[-1] != stash_bytes(codec, width):
        raise ValueError(
            f"held: {held.shape[-1]} of {held.dtype} per row; {codec.value} has {stash_bytes(codec, width)} bytes "
            f"for a width of {width}"
        )
    form = _forms("decode", backend, held.device, dtype)
    num_rows, is_eight_bit = math.prod(held.shape[:-1]), codec is CodecName.eight_bit_token
    num_codes = width if is_eight_bit else -(-width // 2)
    ranges, codes = held.split((held.shape[-1] - num_codes, num_codes), dim=-1)
    codes = codes.contiguous().view(num_rows, num_codes)
    # `contiguous()` would leave a single row as it is, with a stride and an offset that no fp32 view can have.
    ranges = ranges.clone(memory_format=torch.contiguous_format).view(torch.float32).view(num_rows, -1, 2)
    decode = form.decode_eight_bit if is_eight_bit else form.decode_four_bit
    return decode(codes, ranges, width, dtype).view(*held.shape[:-1], width)


def _forms(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that computes: `codecs.reference` or `fused.codecs`, with functions of the same names."""
    if choose(op, backend, device, dtype).got is Backend.triton:
        from headrace.kernels.fused import codecs as fused

        return fused
    from headrace.kernels.codecs import reference

    return reference


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: a codec takes {', '.join(map(str, DTYPES))}")
