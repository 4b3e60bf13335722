"""Published and worked-out figures: why a code of f', why a range per token, why a clamp on both sides."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.codecs.activations import Activation, derivative, fixed_grid
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.derivative import FourBitDerivative
from headrace.kernels.codecs.eight_bit import EightBitPerHead, EightBitPerToken, HeadRange
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.grid import FOUR_BIT_LEVELS, from_codes, grid_step, to_codes
from headrace.kernels.codecs.philox import uniforms
from headrace.kernels.codecs.registry import build_codec


@pytest.mark.parametrize(
    ("activation", "by_x", "by_derivative"), [(Activation.gelu_erf, 0.186, 0.049), (Activation.silu, 0.148, 0.052)]
)
def test_a_code_of_the_derivative_against_a_code_of_x(
    activation: Activation, by_x: float, by_derivative: float
) -> None:
    """Relative error of f'(x), x normal, 4 bits, stochastic. A code of x depends on the sample's extremes: 15 %."""
    x = torch.randn(1 << 17, generator=torch.Generator().manual_seed(0))
    exact = derivative(x.double(), activation)
    codec = FourBitDerivative(activation)
    assert rel_error(codec.decode(codec.encode(x, seed=1)), exact) == pytest.approx(by_derivative, rel=0.015)
    low, high = torch.aminmax(x)
    step = grid_step(low, high, FOUR_BIT_LEVELS)
    decoded = from_codes(to_codes(x, low, step, FOUR_BIT_LEVELS, uniforms(1, x.numel(), 1, 0)[0]), low, step)
    assert rel_error(derivative(decoded.double(), activation), exact) == pytest.approx(by_x, rel=0.15)


def test_a_code_of_x_biases_the_gradient_and_a_code_of_the_derivative_does_not() -> None:
    """At x = 0.7 f' is curved; a million codes of x on the grid of [-4, 4] against as many of f'."""
    x = torch.full((1 << 20,), 0.7)
    exact = float(derivative(torch.tensor(0.7, dtype=torch.float64), Activation.gelu_erf))
    low = torch.tensor(-4.0)
    step = grid_step(low, torch.tensor(4.0), FOUR_BIT_LEVELS)
    codes = to_codes(x, low, step, FOUR_BIT_LEVELS, uniforms(1, x.numel(), 1, 0)[0])
    by_x = float(derivative(from_codes(codes, low, step).double(), Activation.gelu_erf).mean())
    codec = FourBitDerivative(Activation.gelu_erf)
    by_derivative = float(codec.decode(codec.encode(x, seed=1)).double().mean())
    assert abs(by_derivative - exact) < 4 * 0.5 * fixed_grid(Activation.gelu_erf)[1] / 2**10
    assert abs(by_x - exact) > 0.01


def test_one_outlier_with_a_range_per_block_and_per_token() -> None:
    """4096 x 64 normal numbers, one at 1000 x the median size; relative error of all others, nearest rounding.

    One range for all: step h = 674.5 / 255 is beyond the numbers, 0.78 +- the place of the grid. A range per token: 63
    of the 2^18 numbers have that error, the others 0.0054: sqrt(63 / 2^18 * 0.78^2 + 0.0054^2) = 0.013.
    """
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    x[7, 5] = 1000 * x.abs().median()
    others = torch.ones_like(x, dtype=torch.bool)
    others[7, 5] = False

    def error(decoded: torch.Tensor) -> float:
        return rel_error(decoded[others], x[others])

    token, block = EightBitPerToken(Rounding.nearest), EightBitPerHead(Rounding.nearest)
    one_range = x.view(4096, 1, 64)
    assert error(block.decode(block.encode(one_range, seed=0)).view(4096, 64)) == pytest.approx(0.79, rel=0.03)
    assert 0.009 < error(token.decode(token.encode(x, seed=0))) < 0.016
    clean = token.decode(token.encode(x, seed=0))[8:]
    assert rel_error(clean, x[8:]) == pytest.approx(0.0054, rel=0.04)


def test_clamp_against_wrap() -> None:
    """Normal numbers of which 0.05 % are outside +-3.48: 0.011 clamped, 0.112 where a byte overflows as in Mesa.

    Nearest rounding, sqrt(h^2 / 12 + the outliers' excess squared); stochastic rounding is 0.0136.
    """
    x = torch.randn(1, 1, 1 << 20, generator=torch.Generator().manual_seed(0))
    given = HeadRange(torch.tensor([-3.4808]), torch.tensor([3.4808]))
    assert float((x.abs() > given.high).double().mean()) == pytest.approx(5e-4, rel=0.1)
    for rounding, expected in ((Rounding.nearest, 0.011), (Rounding.stochastic, 0.0136)):
        codec = EightBitPerHead(rounding)
        encoded = codec.encode(x, seed=1, head_range=given)
        assert rel_error(codec.decode(encoded), x) == pytest.approx(expected, rel=0.03)
    low, step = encoded.payload[1][0]
    wrapped = ((x - low) / step + 0.5).floor().clamp(min=0).long() % 256
    assert rel_error(from_codes(wrapped, low, step), x) == pytest.approx(0.112, rel=0.02)


def test_eight_bits_are_17_times_as_fine_as_four(normal) -> None:
    x = normal(64, 128)
    fine, coarse = build_codec(CodecName.eight_bit_token), FourBitPerGroup()
    ratio = rel_error(coarse.decode(coarse.encode(x, seed=1)), x) / rel_error(fine.decode(fine.encode(x, seed=1)), x)
    assert ratio == pytest.approx(17, rel=0.03)


@pytest.mark.parametrize("activation", list(Activation))
def test_the_grid_covers_all_that_the_derivative_takes_and_no_more(activation: Activation) -> None:
    x = torch.linspace(-30, 30, 600001, dtype=torch.float64)
    d = derivative(x, activation)
    low, step = fixed_grid(activation)
    assert low <= d.min() < low + 1e-6
    assert low + FOUR_BIT_LEVELS * step >= d.max() > low + FOUR_BIT_LEVELS * step - 2e-4
