"""Every codec: how far it may be off, its bytes, its corner cases, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.activations import Activation, derivative
from headrace.kernels.codecs.config import CodecName, Rounding, check_group_size, stash_bytes, swiglu_bytes
from headrace.kernels.codecs.derivative import FourBitDerivative, FourBitSwiGLU
from headrace.kernels.codecs.eight_bit import EightBitPerHead, EightBitPerToken, HeadRange
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.grid import grid_step, pack_nibbles, to_codes, unpack_nibbles
from headrace.kernels.codecs.interface import Codec, Encoded
from headrace.kernels.codecs.metrics import grid_of
from headrace.kernels.codecs.registry import build_codec

NAMES = list(CodecName)
VALUE_NAMES = [CodecName.eight_bit_token, CodecName.eight_bit_head, CodecName.four_bit_group]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3, 5), (1, 1), (4, 129), (3, 2, 300)]


def stands_for(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    exact = x.double()
    return derivative(exact, codec.activation) if isinstance(codec, FourBitDerivative) else exact


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_off_by_a_step_at_most_and_by_half_when_nearest(name: CodecName, dtype: torch.dtype, shape, normal) -> None:
    x = (3 * normal(*shape)).to(dtype)
    for rounding, share in ((Rounding.stochastic, 1.0), (Rounding.nearest, 0.5)):
        codec = build_codec(name, rounding)
        encoded = codec.encode(x, seed=3)
        got = codec.decode(encoded, dtype=torch.float32)
        step = grid_of(codec, encoded)[1]
        exact = stands_for(codec, x)
        # The slack is fp32's: the range is taken, the value placed and put back in it.
        slack = 4e-7 * max(1.0, float(exact.abs().max()))
        assert ((got.double() - exact).abs() <= share * step + slack).all()
        assert torch.equal(codec.decode(encoded), got.to(dtype))
        assert codec.decode(encoded).dtype is dtype
        assert encoded.shape == shape
        assert encoded.num_bytes == codec.bytes_for(shape, dtype) == stash_bytes(name, shape)


def test_bytes_by_hand() -> None:
    """128 x 4096 activations of 32 heads of 128: bytes an element costs, of each codec."""
    shape, num = (128, 32, 128), 128 * 4096
    assert stash_bytes(CodecName.eight_bit_token, (128, 4096)) == num + 128 * 8
    assert stash_bytes(CodecName.eight_bit_head, shape) == num + 32 * 8
    assert stash_bytes(CodecName.four_bit_group, (128, 4096)) == num // 2 + num // 128 * 8
    assert stash_bytes(CodecName.derivative_silu, shape) == num // 2
    assert swiglu_bytes((128, 4096)) == num + num // 128 * 16 == 1.125 * num
    assert stash_bytes(CodecName.four_bit_group, (3, 33), 16) == 3 * (17 + 3 * 8)
    assert stash_bytes(CodecName.derivative_silu, (3, 3)) == 5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_encode(name: CodecName, shape: tuple[int, ...]) -> None:
    codec = build_codec(name)
    encoded = codec.encode(torch.ones(shape), seed=1)
    assert codec.decode(encoded).shape == shape
    assert encoded.num_bytes == codec.bytes_for(shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VALUE_NAMES)
def test_constants_and_low_ends_are_exact(name: CodecName, dtype: torch.dtype) -> None:
    codec = build_codec(name)
    for value in (0.0, -0.1, 3e4, 6e-8):
        x = torch.full((3, 2, 20), value, dtype=dtype)
        assert torch.equal(codec.decode(codec.encode(x, seed=1)), x)
    x = torch.full((2, 1, 20), 7.0, dtype=dtype)
    x[:, :, ::2] = -1.0
    got = codec.decode(codec.encode(x, seed=1))
    assert torch.equal(got[:, :, ::2], x[:, :, ::2])
    # The high end is on the grid up to the rounding of the step, 2^-15 of the range.
    torch.testing.assert_close(got[:, :, 1::2], x[:, :, 1::2], rtol=0, atol=8 * 2.0**-15)


def test_values_on_the_grid_are_exact_whatever_the_random_number() -> None:
    """A step of 1 and whole numbers; floor(x + u) in fp32 would round the larger ones up at the largest u."""
    x = torch.arange(256.0)
    for u in (0.0, 0.5, 1 - 2.0**-24):
        codes = to_codes(x, torch.tensor(0.0), torch.tensor(1.0), 255, torch.full((256,), u))
        assert torch.equal(codes.float(), x)
    codec = EightBitPerToken()
    assert torch.equal(codec.decode(codec.encode(x.repeat(20, 1), seed=8))[19], x)


def test_the_step_covers_the_range_and_multiplies_exactly(normal) -> None:
    low, high = -normal(1000).abs(), normal(1000).abs()
    for levels in (15, 255):
        step = grid_step(low, high, levels)
        assert (levels * step.double() >= (high.double() - low.double()) * (1 - 2e-7)).all()
        assert (step.double() <= (high.double() - low.double()) / levels * (1 + 2.1e-7 + 2**-15)).all()
        codes = torch.arange(levels + 1.0)[:, None]
        assert torch.equal((codes * step).double(), codes.double() * step.double())
    tiny = torch.tensor([0.0, 1e-45, 1e-41, 1e-38])
    assert (grid_step(torch.zeros(4), tiny, 255) >= tiny / 255).all()


def test_nibbles_come_back(normal) -> None:
    for cols in (1, 2, 7, 16):
        codes = torch.arange(3 * cols, dtype=torch.uint8).view(3, cols) % 16
        packed = pack_nibbles(codes)
        assert packed.shape == (3, -(-cols // 2))
        assert torch.equal(unpack_nibbles(packed, cols), codes)
    assert pack_nibbles(torch.tensor([3, 15, 7], dtype=torch.uint8)).tolist() == [3 + 15 * 16, 7]


@pytest.mark.parametrize("name", NAMES)
def test_replay_and_the_global_generator(name: CodecName, normal) -> None:
    codec, x = build_codec(name), normal(4, 3, 40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = codec.encode(x, seed=5, stream=2)
    codec.decode(first)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(codec.encode(x, seed=5, stream=2).payload[0], first.payload[0])
    for seed, stream in ((6, 2), (5, 3)):
        assert not torch.equal(codec.encode(x, seed=seed, stream=stream).payload[0], first.payload[0])
    assert (first.seed, first.stream, first.rounding) == (5, 2, Rounding.stochastic)
    nearest = build_codec(name, Rounding.nearest)
    assert torch.equal(nearest.encode(x, seed=5).payload[0], nearest.encode(x, seed=6).payload[0])


@pytest.mark.parametrize("name", NAMES)
def test_layout_in_memory_changes_nothing_and_calls_share_nothing(name: CodecName, normal) -> None:
    codec, x = build_codec(name), normal(5, 4, 24)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    first, second = codec.encode(x, seed=5), codec.encode(strided, seed=5)
    assert torch.equal(first.payload[0], second.payload[0])
    kept = codec.decode(first)
    codec.encode(x + 100, seed=6)
    x.fill_(1e9)
    assert torch.equal(codec.decode(first), kept)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = 7  # type: ignore[misc]
    moved = first.with_payload([tensor.clone() for tensor in first.payload])
    assert torch.equal(codec.decode(moved), kept)


def test_inputs_that_require_a_gradient_are_encoded_without_one(normal) -> None:
    for name in NAMES:
        encoded = build_codec(name).encode(normal(2, 3, 8).requires_grad_(), seed=1)
        assert not any(tensor.requires_grad for tensor in encoded.payload)


class TestHeads:
    def test_outliers_are_clamped_on_both_sides(self) -> None:
        x = torch.tensor([-50.0, -1.0, 0.5, 1.0, 50.0]).view(1, 1, 5)
        given = HeadRange(torch.tensor([-1.0]), torch.tensor([1.0]))
        codec = EightBitPerHead()
        got = codec.decode(codec.encode(x, seed=1, head_range=given)).flatten()
        torch.testing.assert_close(got, torch.tensor([-1.0, -1.0, 0.5, 1.0, 1.0]), atol=2.001 / 255, rtol=0)

    def test_each_head_has_its_range(self, normal) -> None:
        x = normal(6, 5, 3, 8) * torch.tensor([1.0, 100.0, 0.01])[:, None]
        found = HeadRange.of(x)
        assert torch.equal(found.low, x.transpose(0, 2).reshape(3, -1).amin(1))
        assert torch.equal(found.high, x.transpose(0, 2).reshape(3, -1).amax(1))
        codec = EightBitPerHead(Rounding.nearest)
        own, given = codec.encode(x, seed=1), codec.encode(x, seed=1, head_range=found)
        assert all(torch.equal(a, b) for a, b in zip(own.payload, given.payload, strict=True))
        error = (codec.decode(own) - x).abs().transpose(0, 2).reshape(3, -1).amax(1)
        assert (error <= 0.5001 * (found.high - found.low) / 255).all()

    def test_the_range_is_a_snapshot(self, normal) -> None:
        """Changed in place after encode, as Mesa's buffers are, the range decodes as it was."""
        x = normal(4, 2, 8)
        found, codec = HeadRange.of(x), EightBitPerHead()
        encoded = codec.encode(x, seed=1, head_range=found)
        before = codec.decode(encoded)
        found.low.mul_(7)
        found.high.mul_(7)
        assert torch.equal(codec.decode(encoded), before)

    def test_a_running_range(self, normal) -> None:
        x, y = normal(4, 2, 8), 5 * normal(4, 2, 8)
        first = HeadRange.of(x)
        low, high = first.low.clone(), first.high.clone()
        moved = first.moved(y)
        torch.testing.assert_close(moved.low, 0.9 * low + 0.1 * y.transpose(0, 1).reshape(2, -1).amin(1))
        torch.testing.assert_close(moved.high, 0.9 * high + 0.1 * y.transpose(0, 1).reshape(2, -1).amax(1))
        assert torch.equal(first.low, low)
        assert torch.equal(first.moved(y, 1.0).high, high)
        with pytest.raises(ValueError, match=r"momentum=1\.5"):
            first.moved(y, 1.5)
        with pytest.raises(ValueError, match="3 heads, the range has 2"):
            first.moved(normal(4, 3, 8))

    def test_bad_ranges(self, normal) -> None:
        x, codec = normal(4, 2, 8), EightBitPerHead()
        good = HeadRange.of(x)
        for low, high, match in (
            (good.high, good.low, "low is above high"),
            (good.low[:1], good.high, r"head_range\.low"),
            (good.low, good.high.double(), r"head_range\.high"),
            (good.low, good.high * math.inf, "range fp32 does not hold"),
        ):
            with pytest.raises(ValueError, match=match):
                codec.encode(x, seed=1, head_range=HeadRange(low, high))
        x[3, 1, 5] = math.inf
        with pytest.raises(ValueError, match="NaN, infinities"):
            codec.encode(x, seed=1, head_range=good)
        unchecked = EightBitPerHead(check_finite=False)
        got = unchecked.decode(unchecked.encode(x, seed=1, head_range=good))
        torch.testing.assert_close(got[3, 1, 5], good.high[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_not_finite_is_refused(name: CodecName, dtype: torch.dtype, bad: float) -> None:
    x = torch.zeros(3, 4, 40, dtype=dtype)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match=f"x: .* NaN, infinities .*{name.value}"):
        build_codec(name).encode(x, seed=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [CodecName.eight_bit_token, CodecName.four_bit_group])
def test_unchecked_the_row_shows_it_and_the_others_do_not(name: CodecName, bad: float, normal) -> None:
    x = normal(3, 40)
    x[1, 3] = bad
    codec = build_codec(name, check_finite=False)
    got = codec.decode(codec.encode(x, seed=1))
    assert not got[1].isfinite().any()
    assert (got[[0, 2]] - x[[0, 2]]).abs().max() < 0.5


def test_a_range_beyond_fp32_is_refused() -> None:
    x = torch.tensor([[3e38, -3e38]])
    for name in VALUE_NAMES:
        with pytest.raises(ValueError, match="range fp32 does not hold"):
            build_codec(name).encode(x, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name: CodecName, normal) -> None:
    codec, x = build_codec(name), normal(2, 3, 8)
    for dtype in (torch.float64, torch.int32, torch.uint8):
        with pytest.raises(ValueError, match=r"x: dtype .*; a codec takes torch\.float32"):
            codec.encode(x.to(dtype), seed=1)
        with pytest.raises(ValueError, match="dtype: dtype"):
            codec.bytes_for(x.shape, dtype)
    for seed in (-1, 2**63, 0.5, True):
        with pytest.raises(ValueError, match="seed="):
            codec.encode(x, seed=seed)  # type: ignore[arg-type]
    for stream in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match="stream="):
            codec.encode(x, seed=1, stream=stream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend=stock"):
        codec.encode(x, seed=1, backend=Backend.stock)
    encoded = codec.encode(x, seed=1)
    with pytest.raises(ValueError, match="dtype: dtype"):
        codec.decode(encoded, dtype=torch.float64)
    with pytest.raises(ValueError, match="payload"):
        codec.decode(encoded.with_payload(encoded.payload[:-1]))
    with pytest.raises(ValueError, match="payload"):
        codec.decode(encoded.with_payload([encoded.payload[0][1:], *encoded.payload[1:]]))
    other = build_codec(NAMES[NAMES.index(name) - 1])
    with pytest.raises(ValueError, match=f"written by {name.value}"):
        other.decode(encoded)


def test_too_few_dimensions_and_bad_groups(normal) -> None:
    for name, ndim in ((CodecName.eight_bit_token, 1), (CodecName.eight_bit_head, 2), (CodecName.four_bit_group, 1)):
        x = normal(*[3] * (ndim - 1))
        with pytest.raises(ValueError, match=f"x: shape .* takes at least {ndim} dimensions"):
            build_codec(name).encode(x, seed=1)
        with pytest.raises(ValueError, match="takes at least"):
            stash_bytes(name, x.shape)
    assert build_codec(CodecName.derivative_silu).encode(torch.tensor(1.0), seed=1).num_bytes == 1
    for group_size in (0, 8, 48, 2048):
        with pytest.raises(ValueError, match=f"group_size={group_size}"):
            check_group_size(group_size)
        with pytest.raises(ValueError, match="group_size="):
            FourBitPerGroup(group_size=group_size)
        with pytest.raises(ValueError, match="group_size="):
            FourBitSwiGLU(group_size=group_size)
    encoded = FourBitPerGroup(group_size=16).encode(normal(2, 40), seed=1)
    with pytest.raises(ValueError, match="payload"):
        FourBitPerGroup(group_size=32).decode(encoded)


def test_registry_names_every_codec() -> None:
    for name in NAMES:
        assert build_codec(name).name is name
    assert {activation.codec for activation in Activation} < set(NAMES)
    assert isinstance(build_codec(CodecName.eight_bit_token).encode(torch.ones(2), seed=1), Encoded)
