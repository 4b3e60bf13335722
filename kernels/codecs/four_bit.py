"""4-bit codes of unbounded values, with a range for every group of neighbours (the granularity of GACT and ActNN)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import GROUP_SIZE, CodecName, Rounding, check_group_size, stash_bytes
from headrace.kernels.codecs.interface import (
    Encoded,
    check_dtype,
    check_encode,
    check_finite,
    check_payload,
    check_writer,
    forms,
)


def group_shapes(shape: Sequence[int], group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and ranges: (..., ceil(D / 2)) and (..., ceil(D / group_size), 2) for (..., D)."""
    *lead, cols = shape
    return (*lead, -(-cols // 2)), (*lead, -(-cols // group_size), 2)


@dataclass(frozen=True)
class FourBitPerGroup:
    """A range, from smallest to largest, for every `group_size` neighbours of the last dimension; two codes a byte.

    Args:
        group_size: a power of two from 16 to 1024.
        check_finite: refuse NaN, infinities and groups whose range fp32 does not hold; on CUDA the host waits for
            the answer. Unchecked, such a group, and no other, decodes to NaN or infinities.

    Raises:
        ValueError: the group size.
    """

    rounding: Rounding = Rounding.stochastic
    check_finite: bool = True
    group_size: int = GROUP_SIZE
    name: ClassVar[CodecName] = CodecName.four_bit_group

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def encode(self, x: torch.Tensor, *, seed: int, stream: int = 0, backend: Backend = Backend.auto) -> Encoded:
        """Codes (..., ceil(D / 2)) and ranges (..., ceil(D / group_size), 2) of x (..., D); see Codec.encode."""
        check_encode(self.name, x, seed, stream)
        rows = x.detach().contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])
        form = forms("encode", backend, x.device, x.dtype)
        seed_used = seed if self.rounding is Rounding.stochastic else None
        codes, ranges = form.encode_groups(rows, self.group_size, seed_used, stream)
        if self.check_finite:
            check_finite(self.name, "a group", ranges)
        shapes = group_shapes(x.shape, self.group_size)
        payload = (codes.view(shapes[0]), ranges.view(shapes[1]))
        return Encoded(self.name, payload, tuple(x.shape), x.dtype, self.rounding, seed, stream)

    def decode(
        self, encoded: Encoded, *, dtype: torch.dtype | None = None, backend: Backend = Backend.auto
    ) -> torch.Tensor:
        """x (..., D), up to a step per element; see Codec.decode."""
        check_writer(self.name, encoded)
        shapes = group_shapes(encoded.shape, self.group_size)
        check_payload(self.name, encoded, shapes)
        dtype = encoded.dtype if dtype is None else dtype
        check_dtype("dtype", dtype)
        codes, ranges = encoded.payload
        form = forms("decode", backend, codes.device, dtype)
        rows, cols = math.prod(encoded.shape[:-1]), encoded.shape[-1]
        codes, ranges = codes.view(rows, shapes[0][-1]), ranges.view(rows, shapes[1][-2], 2)
        return form.decode_groups(codes, ranges, cols, self.group_size, dtype).view(encoded.shape)

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Half a byte per element and 8 per group."""
        check_dtype("dtype", dtype)
        return stash_bytes(self.name, shape, self.group_size)
