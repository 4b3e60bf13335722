"""The codecs' Triton kernels against their reference: the same bits, but for the last digit of exp."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs import reference
from headrace.kernels.codecs.activations import Activation
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.eight_bit import EightBitPerHead, EightBitPerToken, HeadRange
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.grid import unpack_nibbles
from headrace.kernels.codecs.philox import philox
from headrace.kernels.codecs.registry import build_codec
from headrace.kernels.codecs.s2a import gelu_s2a, silu_s2a, swiglu_s2a

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from headrace.kernels.fused.codec_kernels import _thresholds

    @triton.jit
    def draw_kernel(first, out_ptr, seed, stream):
        """Sixteen numbers from block `first` on."""
        block = tl.full((1, 4), 0, tl.int64) + first + tl.arange(0, 4)[None, :]
        tl.store(out_ptr + tl.arange(0, 16)[None, :], _thresholds(block, seed, stream, True))


# What the interpreter's numpy says of exp(200) and of infinities, which the kernels are meant to get through.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SEEDS = [None, 2**62 + 12345]
GROUP = 16


@pytest.fixture(scope="module")
def fused():
    """The module of the kernels; it cannot be imported without triton."""
    from headrace.kernels.fused import codecs

    return codecs


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers of size 3; the first row is constant, and one outlier is in the last."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x[0], x[-1, -1] = 1.5, 1e4
    return x


def assert_same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(3, 1030), (300, 7), (1, 1)])
def test_rows_have_the_same_bits(fused, seed: int | None, shape: tuple[int, int]) -> None:
    """A row of two tiles, rows of two tiles, one element."""
    x = numbers(*shape)
    expected = reference.encode_rows(x, seed, 3)
    assert_same(fused.encode_rows(x, seed, 3), expected)
    assert_same((fused.decode_rows(*expected, torch.float32),), (reference.decode_rows(*expected, torch.float32),))


@pytest.mark.parametrize("seed", SEEDS)
def test_given_ranges_have_the_same_bits_and_clamp(fused, seed: int | None) -> None:
    x = numbers(10, 37)
    ranges = torch.tensor([[-1.0, 1 / 128], [0.0, 0.0], [-9.0, 0.0625], [2.0, 0.5], [-0.25, 2.0**-9]])
    expected = reference.encode_given(x, ranges, seed, 1)
    assert expected.min() == 0
    assert expected.max() == 255
    assert_same((fused.encode_given(x, ranges, seed, 1),), (expected,))
    assert_same(
        (fused.decode_rows(expected, ranges, torch.float32),), (reference.decode_rows(expected, ranges, torch.float32),)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(3, 500), (40, 7), (1, 1)])
def test_groups_have_the_same_bits(fused, seed: int | None, shape: tuple[int, int]) -> None:
    x = numbers(*shape)
    expected = reference.encode_groups(x, GROUP, seed, 3)
    assert_same(fused.encode_groups(x, GROUP, seed, 3), expected)
    decoded = reference.decode_groups(*expected, shape[1], GROUP, torch.float32)
    assert_same((fused.decode_groups(*expected, shape[1], GROUP, torch.float32),), (decoded,))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("seed", [None, 2**40 + 1])
def test_derivative_codes(fused, activation: Activation, seed: int | None) -> None:
    """Two tiles and a half-filled byte. Codes may differ by one where exp differs: here in one of 2,500 at most."""
    x = torch.cat((numbers(1, 2491)[0], torch.tensor([-3e38, -200.0, -50.0, -0.0, 0.0, 50.0, 200.0, 3e38])))
    expected = reference.encode_derivative(x, activation, seed, 3)
    got = fused.encode_derivative(x, activation, seed, 3)
    codes, theirs = (unpack_nibbles(packed, x.numel()).int() for packed in (got, expected))
    assert (codes - theirs).abs().max() <= 1
    assert (codes != theirs).sum() <= 1
    assert got[-1] >> 4 == 0
    decoded = fused.decode_derivative(expected, x.numel(), activation, torch.float32)
    assert_same((decoded,), (reference.decode_derivative(expected, x.numel(), activation, torch.float32),))
    grad = numbers(1, x.numel())[0]
    backward = fused.derivative_backward(grad, expected, activation)
    assert_same((backward,), (reference.derivative_backward(grad, expected, activation),))


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("shape", [(3, 401), (70, 5)])
def test_swiglu(fused, seed: int | None, shape: tuple[int, int]) -> None:
    gate, up, grad = numbers(*shape) / 2, numbers(*shape).flip(0), numbers(*shape)
    expected = reference.encode_swiglu(gate, up, GROUP, seed, 3)
    got = fused.encode_swiglu(gate, up, GROUP, seed, 3)
    for place in (0, 2):
        torch.testing.assert_close(got[place + 1], expected[place + 1], rtol=2e-5, atol=1e-6)
        codes, theirs = (unpack_nibbles(found[place], shape[1]).int() for found in (got, expected))
        assert (codes - theirs).abs().max() <= 1
        assert (codes != theirs).sum() <= 2
    assert_same(fused.swiglu_backward(grad, expected, GROUP), reference.swiglu_backward(grad, expected, GROUP))


def test_random_numbers_of_a_block_beyond_32_bits(fused) -> None:
    """The kernels' generator on block numbers that no tensor here reaches, against the integers of torch."""
    for first in (2**32 - 2, 2**40 + 5):
        out = torch.empty(16)
        draw_kernel[(1,)](first, out, 2**50 + 3, 2**31 + 5)
        words = torch.stack(philox(torch.arange(first, first + 4), 2**50 + 3, 2**31 + 5), dim=-1).flatten()
        assert torch.equal(out, (words >> 8).float() * 2.0**-24)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", list(CodecName))
def test_codecs_by_backend(fused, name: CodecName, rounding: Rounding) -> None:
    """What one backend wrote the other reads; nothing to encode launches nothing."""
    codec, x = build_codec(name, rounding), numbers(4, 15).view(4, 3, 5)
    ours, theirs = (codec.encode(x, seed=3, stream=1, backend=b) for b in (Backend.triton, Backend.reference))
    assert_same(ours.payload, theirs.payload)
    assert_same((codec.decode(ours, backend=Backend.reference),), (codec.decode(theirs, backend=Backend.triton),))
    for shape in ((0, 3, 4), (2, 3, 0)):
        empty = codec.encode(torch.ones(shape), seed=1, backend=Backend.triton)
        assert codec.decode(empty, backend=Backend.triton).shape == shape
        assert empty.num_bytes == codec.bytes_for(shape, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_shows_it(fused, bad: float) -> None:
    """The hardware's minimum passes over a NaN; the kernels do not."""
    x = numbers(3, 20)
    x[1, 3] = bad
    for kind in (EightBitPerToken, FourBitPerGroup):
        unchecked = kind(check_finite=False)
        got = unchecked.decode(unchecked.encode(x, seed=1, backend=Backend.triton), backend=Backend.triton)
        assert not got[1].isfinite().any()
        assert got[[0, 2]].isfinite().all()
        with pytest.raises(ValueError, match="NaN, infinities"):
            kind().encode(x, seed=1, backend=Backend.triton)


def test_head_range_by_triton(fused) -> None:
    x = numbers(5, 16).view(5, 2, 8)
    given = HeadRange(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 0.5]))
    codec = EightBitPerHead()
    ours, theirs = (codec.encode(x, seed=3, head_range=given, backend=b) for b in (Backend.triton, Backend.reference))
    assert_same(ours.payload, theirs.payload)


def test_s2a_by_triton(fused) -> None:
    """The same gradients through autograd; the forward is torch's in both."""
    gate, up, cotangent = (numbers(3, 21).requires_grad_() for _ in range(3))
    cotangent = cotangent.detach()
    calls = (
        lambda backend: silu_s2a(gate, seed=3, backend=backend),
        lambda backend: gelu_s2a(gate, seed=3, backend=backend),
        lambda backend: gelu_s2a(gate, seed=3, approximate="tanh", backend=backend),
        lambda backend: swiglu_s2a(gate, up, seed=3, group_size=GROUP, backend=backend) + 0 * up,
    )
    for call in calls:
        y, expected = call(Backend.triton), call(Backend.reference)
        assert torch.equal(y, expected)
        inputs = [tensor for tensor in (gate, up) if tensor is gate or call is calls[-1]]
        grads = (torch.autograd.grad(out, inputs, cotangent) for out in (y, expected))
        for got, other in zip(*grads, strict=True):
            torch.testing.assert_close(got, other, rtol=2e-5, atol=1e-5)
