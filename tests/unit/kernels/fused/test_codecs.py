"""The codecs' Triton kernels against their reference: the same bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.config import CodecName
from headrace.kernels.codecs.philox import philox
from headrace.kernels.codecs.rows import decode_rows, encode_rows

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from headrace.kernels.fused.codec_kernels import _thresholds

    @triton.jit
    def draw_kernel(first, out_ptr, seed, stream):
        """Sixteen numbers from block `first` on."""
        block = tl.full((1, 4), 0, tl.int64) + first + tl.arange(0, 4)[None, :]
        tl.store(out_ptr + tl.arange(0, 16)[None, :], _thresholds(block, seed, stream))


# What the interpreter's numpy says of infinities, which the kernels are meant to get through.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers of size 3; the first row is constant, and one outlier is in the last."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x[0], x[-1, -1] = 1.5, 1e4
    return x


def both(codec: CodecName, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes by Triton and by the reference."""
    ours, theirs = (
        encode_rows(codec, x, seed=2**62 + 12345, stream=3, backend=b) for b in (Backend.triton, Backend.reference)
    )
    return ours, theirs


@pytest.mark.parametrize("shape", [(3, 1030), (300, 7), (1, 1), (2, 3, 129)])
@pytest.mark.parametrize("codec", list(CodecName))
def test_rows_have_the_same_bits(codec: CodecName, shape: tuple[int, ...]) -> None:
    """A row of two tiles, rows of two tiles, one element, a group that is not full."""
    ours, theirs = both(codec, numbers(*shape))
    assert torch.equal(ours, theirs)
    values = [
        decode_rows(codec, theirs, shape[-1], torch.float32, backend=b) for b in (Backend.triton, Backend.reference)
    ]
    assert torch.equal(*values)


def test_random_numbers_of_a_block_beyond_32_bits() -> None:
    """The kernels' generator on block numbers that no tensor here reaches, against the integers of torch."""
    for first in (2**32 - 2, 2**40 + 5):
        out = torch.empty(16)
        draw_kernel[(1,)](first, out, 2**50 + 3, 2**31 + 5)
        words = torch.stack(philox(torch.arange(first, first + 4), 2**50 + 3, 2**31 + 5), dim=-1).flatten()
        assert torch.equal(out, (words >> 8).float() * 2.0**-24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("codec", list(CodecName))
def test_a_row_that_is_not_finite_shows_it(codec: CodecName, bad: float) -> None:
    """The hardware's minimum passes over a NaN; the kernels do not."""
    x = numbers(3, 20)
    x[1, 3] = bad
    got = decode_rows(codec, both(codec, x)[0], 20, torch.float32, backend=Backend.triton)
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()
