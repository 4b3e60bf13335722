"""The codecs: how far they may be off, that they are right on average, their bytes, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.helpers.tolerances import rel_error
from headrace.kernels.backend import Backend
from headrace.kernels.codecs import reference
from headrace.kernels.codecs.config import GROUP_SIZE, CodecName, plain_traffic, stash_bytes
from headrace.kernels.codecs.grid import grid_step, pack_nibbles, to_codes, unpack_nibbles
from headrace.kernels.codecs.philox import uniforms
from headrace.kernels.codecs.rows import decode_rows, encode_rows

CODECS = list(CodecName)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_DRAWS = 400


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write; a view moves none."""

    num_bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op.overloadpacket is not torch.ops.aten.empty:
            self.num_bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planner_counts_the_bytes_that_the_operators_move(codec: CodecName, dtype: torch.dtype) -> None:
    x = normal(512, 256).to(dtype)
    with Traffic() as encoding:
        held = encode_rows(codec, x, seed=1, stream=1)
    with Traffic() as decoding:
        decode_rows(codec, held, 256, dtype)
    wanted = [512 * num_bytes for num_bytes in plain_traffic(codec, 256, dtype.itemsize)]
    assert [encoding.num_bytes, decoding.num_bytes] == pytest.approx(wanted, rel=0.01)


def normal(*shape: int) -> torch.Tensor:
    """Seeded normal numbers, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def there_and_back(codec: CodecName, x: torch.Tensor, seed: int = 5, stream: int = 0) -> torch.Tensor:
    return decode_rows(codec, encode_rows(codec, x, seed=seed, stream=stream), x.shape[-1], x.dtype)


def steps(codec: CodecName, x: torch.Tensor) -> torch.Tensor:
    """The closed form of the step at every element: the range of its row or group by the number of codes less one."""
    size, levels = (x.shape[-1], 255) if codec is CodecName.eight_bit_token else (GROUP_SIZE, 15)
    parts = [part.double() for part in x.split(size, dim=-1)]
    spread = [((part.amax(-1) - part.amin(-1)) / levels)[..., None].expand_as(part) for part in parts]
    return torch.cat(spread, dim=-1)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1), (4, 129), (3, 2, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_rows_come_back_off_by_a_step_at_most(codec: CodecName, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3 * normal(*shape)).to(dtype)
    held = encode_rows(codec, x, seed=3, stream=4)
    assert held.dtype is torch.uint8
    assert held.shape == (*shape[:-1], stash_bytes(codec, shape[-1]))
    got = decode_rows(codec, held, shape[-1], torch.float32)
    # The step is rounded up to 16 bits. The slack is fp32's: the range is taken, the value placed and put back in it.
    slack = 4e-7 * max(1.0, float(x.abs().max()))
    assert ((got.double() - x.double()).abs() <= steps(codec, x) * (1 + 2**-15) + slack).all()
    assert torch.equal(decode_rows(codec, held, shape[-1], dtype), got.to(dtype))
    if x.ndim == 3:
        for rows in (1, 2):
            span = decode_rows(codec, held[:rows, 1:2], shape[-1], torch.float32)
            assert torch.equal(span, got[:rows, 1:2]), "a span of rows is coded by itself"


def test_bytes_by_hand() -> None:
    assert stash_bytes(CodecName.eight_bit_token, 4096) == 4096 + 8
    assert stash_bytes(CodecName.four_bit_group, 4096) == 2048 + 32 * 8
    assert stash_bytes(CodecName.four_bit_group, 129) == 65 + 2 * 8


def draws_of(codec: CodecName, x: torch.Tensor) -> torch.Tensor:
    """NUM_DRAWS codes of x (R, C) under one seed: places, and with them the random numbers, all differ."""
    return there_and_back(codec, x.expand(NUM_DRAWS, *x.shape))


def variance_of(codec: CodecName, x: torch.Tensor) -> torch.Tensor:
    """h^2 p (1 - p) of stochastic rounding, in fp64; x has one range per row."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = grid_step(low, high, 255 if codec is CodecName.eight_bit_token else 15).double()
    share = (x.double() - low) / step % 1
    return step.square() * share * (1 - share)


def standard_errors(draws: torch.Tensor, exact: torch.Tensor, variance: torch.Tensor) -> float:
    """How far the mean of the draws is off; elements are summed with fixed signs, so that small errors add up."""
    worst = 0.0
    for weight in (torch.ones_like(exact), normal(*exact.shape).sign(), exact.sign()):
        off = (weight * (draws.double().mean(0) - exact.double())).sum().abs()
        worst = max(worst, float(off / (variance.sum() / NUM_DRAWS).sqrt()))
    return worst


def variance_ratio(draws: torch.Tensor, variance: torch.Tensor) -> float:
    return float(draws.double().var(0).sum() / variance.sum())


@pytest.mark.parametrize("codec", CODECS)
def test_right_on_average_with_the_predicted_variance_and_mutants_are_not(
    codec: CodecName, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(6, 50)
    variance = variance_of(codec, x)

    def random_numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "uniforms", lambda *a: change(uniforms(*a)))
            return draws_of(codec, x)

    draws = draws_of(codec, x)
    assert standard_errors(draws, x, variance) < 4
    assert abs(variance_ratio(draws, variance) - 1) < 0.05
    assert standard_errors(random_numbers(lambda u: 0.95 * u), x, variance) > 4
    assert standard_errors(random_numbers(lambda u: torch.full_like(u, 0.5)), x, variance) > 4, "nearest is biased"
    assert variance_ratio(random_numbers(lambda u: u.flatten()[0].expand_as(u)), variance) < 0.05


def test_one_outlier_spoils_its_own_row_or_group() -> None:
    """Eight bits: 63 of 2^18 numbers have the error of the wide step. Four bits are 17 times as coarse as eight."""
    x = normal(4096, 64)
    error = {codec: rel_error(there_and_back(codec, x), x) for codec in CODECS}
    assert error[CodecName.four_bit_group] / error[CodecName.eight_bit_token] == pytest.approx(17, rel=0.03)
    x[7, 5] = 1000 * x.abs().median()
    got = there_and_back(CodecName.eight_bit_token, x)
    others = torch.arange(4096) != 7
    assert rel_error(got[others], x[others]) == pytest.approx(error[CodecName.eight_bit_token], rel=0.01)
    assert rel_error(got[7, 6:], x[7, 6:]) > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", CODECS)
def test_constants_and_low_ends_are_exact(codec: CodecName, dtype: torch.dtype) -> None:
    for value in (0.0, -0.1, 3e4, 6e-8):
        x = torch.full((3, 20), value, dtype=dtype)
        assert torch.equal(there_and_back(codec, x), x)
    x = torch.full((2, 20), 7.0, dtype=dtype)
    x[:, ::2] = -1.0
    got = there_and_back(codec, x)
    assert torch.equal(got[:, ::2], x[:, ::2])
    # The high end is on the grid up to the rounding of the step, 2^-15 of the range.
    torch.testing.assert_close(got[:, 1::2], x[:, 1::2], rtol=0, atol=8 * 2.0**-15)


def test_values_on_the_grid_are_exact_whatever_the_random_number() -> None:
    """A step of 1 and whole numbers; floor(x + u) in fp32 would round the larger ones up at the largest u."""
    x = torch.arange(256.0)
    for u in (0.0, 0.5, 1 - 2.0**-24):
        codes = to_codes(x, torch.tensor(0.0), torch.tensor(1.0), 255, torch.full((256,), u))
        assert torch.equal(codes.float(), x)
    outside = to_codes(torch.tensor([-50.0, math.nan, 1e9]), torch.tensor(0.0), torch.tensor(1.0), 255, torch.zeros(3))
    assert outside.tolist() == [0, 0, 255], "clamped on both sides"


def test_the_step_covers_the_range_and_multiplies_exactly() -> None:
    low, high = -normal(1000).abs(), normal(1000).abs()
    for levels in (15, 255):
        step = grid_step(low, high, levels)
        assert (levels * step.double() >= (high.double() - low.double()) * (1 - 2e-7)).all()
        assert (step.double() <= (high.double() - low.double()) / levels * (1 + 2.1e-7 + 2**-15)).all()
        codes = torch.arange(levels + 1.0)[:, None]
        assert torch.equal((codes * step).double(), codes.double() * step.double())
    tiny = torch.tensor([0.0, 1e-45, 1e-41, 1e-38])
    assert (grid_step(torch.zeros(4), tiny, 255) >= tiny / 255).all()


def test_nibbles_come_back() -> None:
    for cols in (1, 2, 7, 16):
        codes = torch.arange(3 * cols, dtype=torch.uint8).view(3, cols) % 16
        packed = pack_nibbles(codes)
        assert packed.shape == (3, -(-cols // 2))
        assert torch.equal(unpack_nibbles(packed, cols), codes)
    assert pack_nibbles(torch.tensor([3, 15, 7], dtype=torch.uint8)).tolist() == [3 + 15 * 16, 7]


@pytest.mark.parametrize("codec", CODECS)
def test_seed_and_stream_decide_and_layout_and_torch_generators_do_not(codec: CodecName) -> None:
    x = normal(4, 3, 40)
    before = torch.get_rng_state()
    first = encode_rows(codec, x.clone().requires_grad_(), seed=5, stream=2)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before)
    strided = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    assert torch.equal(encode_rows(codec, strided, seed=5, stream=2), first)
    for seed, stream in ((6, 2), (5, 3)):
        assert not torch.equal(encode_rows(codec, x, seed=seed, stream=stream), first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("codec", CODECS)
def test_a_row_that_is_not_finite_shows_it_and_the_others_do_not(codec: CodecName, bad: float) -> None:
    """3e38 beside -3e38 is a range that fp32 does not hold."""
    x = normal(3, 40)
    x[1, 3], x[1, 4] = bad, -3e38
    got = there_and_back(codec, x)
    assert not got[1].isfinite().any()
    assert (got[[0, 2]] - x[[0, 2]]).abs().max() < 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_bad_input(codec: CodecName) -> None:
    x = normal(2, 8)
    for dtype in (torch.float64, torch.int32, torch.uint8):
        with pytest.raises(ValueError, match=r"dtype .*: a codec takes torch\.float32"):
            encode_rows(codec, x.to(dtype), seed=1, stream=0)
    for seed, stream in ((-1, 0), (2**63, 0), (0.5, 0), (True, 0), (1, -1), (1, 2**32), (1, 0.5)):
        with pytest.raises(ValueError, match="stream=" if seed == 1 and seed is not True else "seed="):
            encode_rows(codec, x, seed=seed, stream=stream)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend=stock"):
        encode_rows(codec, x, seed=1, stream=0, backend=Backend.stock)
    held = encode_rows(codec, x, seed=1, stream=0)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        decode_rows(codec, held, 8, torch.float64)
    for wrong, width in ((held[:, 1:], 8), (held.float(), 8), (held, 10)):
        with pytest.raises(ValueError, match=f"{codec.value} has"):
            decode_rows(codec, wrong, width, torch.float32)
