"""8-bit codes of values: a range per token, or per head as in Mesa (Pan et al. 2021, arXiv 2111.11124)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import CodecName, Rounding, stash_bytes
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, grid_step
from headrace.kernels.codecs.interface import (
    Encoded,
    check_dtype,
    check_encode,
    check_finite,
    check_payload,
    check_writer,
    forms,
)


@dataclass(frozen=True)
class EightBitPerToken:
    """A range, from smallest to largest, for every row of the last dimension; one outlier spoils its own row only.

    Args:
        check_finite: refuse NaN, infinities and rows whose range fp32 does not hold; on CUDA the host waits for the
            answer. Unchecked, such a row, and no other, decodes to NaN or infinities.
    """

    rounding: Rounding = Rounding.stochastic
    check_finite: bool = True
    name: ClassVar[CodecName] = CodecName.eight_bit_token

    def encode(self, x: torch.Tensor, *, seed: int, stream: int = 0, backend: Backend = Backend.auto) -> Encoded:
        """Codes (..., D) and ranges (..., 2) of x (..., D); see Codec.encode."""
        check_encode(self.name, x, seed, stream)
        rows = x.detach().contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])
        form = forms("encode", backend, x.device, x.dtype)
        codes, ranges = form.encode_rows(rows, _seed_of(self.rounding, seed), stream)
        if self.check_finite:
            check_finite(self.name, "a row", ranges)
        payload = (codes.view(x.shape), ranges.view(*x.shape[:-1], 2))
        return Encoded(self.name, payload, tuple(x.shape), x.dtype, self.rounding, seed, stream)

    def decode(
        self, encoded: Encoded, *, dtype: torch.dtype | None = None, backend: Backend = Backend.auto
    ) -> torch.Tensor:
        """x (..., D), up to a step per element; see Codec.decode."""
        check_writer(self.name, encoded)
        check_payload(self.name, encoded, (encoded.shape, (*encoded.shape[:-1], 2)))
        return _decode(encoded, dtype, backend)

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """A byte per element and 8 per row."""
        check_dtype("dtype", dtype)
        return stash_bytes(self.name, shape)


@dataclass(frozen=True)
class HeadRange:
    """The range of every head, fp32 (G,). `moved` gives a new one: what a call was given is never changed.

    It is the caller's to keep, per layer, and to store in checkpoints.
    """

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor) -> HeadRange:
        """Smallest and largest value of every head of x (..., G, D).

        Raises:
            ValueError: fewer than two dimensions, or an empty x, which has no range.
        """
        if x.ndim < 2 or x.numel() == 0:
            raise ValueError(f"x: shape {tuple(x.shape)}; a head range needs (..., heads, size) with elements")
        others = [axis for axis in range(x.ndim) if axis != x.ndim - 2]
        x = x.detach()
        return cls(x.amin(others).float(), x.amax(others).float())

    def moved(self, x: torch.Tensor, momentum: float = 0.9) -> HeadRange:
        """Mesa's running range: momentum * this + (1 - momentum) * the range of x, as a new HeadRange.

        Raises:
            ValueError: momentum outside [0, 1], another number of heads.
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum}: from 0 to 1")
        now = HeadRange.of(x)
        if now.low.shape != self.low.shape:
            raise ValueError(f"x: {len(now.low)} heads, the range has {len(self.low)}")
        return HeadRange(torch.lerp(now.low, self.low, momentum), torch.lerp(now.high, self.high, momentum))


@dataclass(frozen=True)
class EightBitPerHead:
    """A range for every head of x (..., heads, size), over all tokens: the tensor's own, or one that is given.

    Values outside a given range are clamped to it, on both sides; those are no longer right on average.

    Args:
        check_finite: refuse NaN, infinities and ranges that fp32 does not hold; reads x once more where the range is
            given, and on CUDA the host waits for the answer. Unchecked, a NaN under a given range becomes its low end.
    """

    rounding: Rounding = Rounding.stochastic
    check_finite: bool = True
    name: ClassVar[CodecName] = CodecName.eight_bit_head

    def encode(
        self,
        x: torch.Tensor,
        *,
        seed: int,
        stream: int = 0,
        backend: Backend = Backend.auto,
        head_range: HeadRange | None = None,
    ) -> Encoded:
        """Codes (..., G, D) and ranges (G, 2) of x (..., G, D); see Codec.encode. The range given is copied.

        Raises:
            ValueError: also where the range is not fp32 (G,) on x's device, or its low end is above its high end.
        """
        check_encode(self.name, x, seed, stream)
        ranges = self._ranges(x, head_range)
        rows = x.detach().contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])
        form = forms("encode", backend, x.device, x.dtype)
        codes = form.encode_given(rows, ranges, _seed_of(self.rounding, seed), stream)
        payload = (codes.view(x.shape), ranges)
        return Encoded(self.name, payload, tuple(x.shape), x.dtype, self.rounding, seed, stream)

    def _ranges(self, x: torch.Tensor, given: HeadRange | None) -> torch.Tensor:
        """(G, 2) low end and step, in memory of their own."""
        if given is None and x.numel() == 0:
            return torch.zeros(x.shape[-2], 2, device=x.device)
        found = HeadRange.of(x) if given is None else given
        for end, tensor in (("low", found.low), ("high", found.high)):
            got = (tuple(tensor.shape), tensor.dtype, tensor.device)
            if got != ((x.shape[-2],), torch.float32, x.device):
                raise ValueError(f"head_range.{end}: {got}, expected fp32 ({x.shape[-2]},) on {x.device}")
        ranges = torch.stack((found.low, grid_step(found.low, found.high, EIGHT_BIT_LEVELS)), dim=-1)
        if self.check_finite:
            check_finite(self.name, "a head's range", ranges)
            if given is not None:
                check_finite(self.name, "the tensor", x)
                if bool((found.low > found.high).any()):
                    raise ValueError("head_range: low is above high for some head")
        return ranges

    def decode(
        self, encoded: Encoded, *, dtype: torch.dtype | None = None, backend: Backend = Backend.auto
    ) -> torch.Tensor:
        """x (..., G, D), clamped to the range and up to a step per element; see Codec.decode."""
        check_writer(self.name, encoded)
        check_payload(self.name, encoded, (encoded.shape, (encoded.shape[-2], 2)))
        return _decode(encoded, dtype, backend)

    def bytes_for(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """A byte per element and 8 per head."""
        check_dtype("dtype", dtype)
        return stash_bytes(self.name, shape)


def _seed_of(rounding: Rounding, seed: int) -> int | None:
    return seed if rounding is Rounding.stochastic else None


def _decode(encoded: Encoded, dtype: torch.dtype | None, backend: Backend) -> torch.Tensor:
    dtype = encoded.dtype if dtype is None else dtype
    check_dtype("dtype", dtype)
    codes, ranges = encoded.payload
    form = forms("decode", backend, codes.device, dtype)
    rows = codes.view(math.prod(encoded.shape[:-1]), encoded.shape[-1])
    return form.decode_rows(rows, ranges.view(-1, 2), dtype).view(encoded.shape)
