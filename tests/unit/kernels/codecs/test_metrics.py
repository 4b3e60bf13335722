"""Measured against predicted error of a stash, and what makes them differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.eight_bit import EightBitPerHead, HeadRange
from headrace.kernels.codecs.metrics import stash_error
from headrace.kernels.codecs.registry import build_codec
from headrace.kernels.codecs.s2a import silu_s2a


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("name", list(CodecName))
def test_measured_is_as_predicted(name: CodecName, rounding: Rounding, normal) -> None:
    """20,000 elements: a sum of squared errors is known to about 1 %."""
    codec, x = build_codec(name, rounding), normal(40, 4, 125)
    found = stash_error(codec, x, codec.encode(x, seed=3))
    assert found.measured == pytest.approx(found.predicted, rel=0.04 if rounding is Rounding.stochastic else 1e-3)
    assert found.clamped_share == 0
    assert 0 < found.measured < 0.05 * found.reference


def test_the_weighted_error_is_the_variance_of_the_gradient(normal) -> None:
    x, cotangent = normal(100, 50).requires_grad_(), normal(100, 50)
    codec = build_codec(CodecName.derivative_silu)
    found = stash_error(codec, x, codec.encode(x, seed=3), weight=cotangent)
    (grad,) = torch.autograd.grad(silu_s2a(x, seed=3), x, cotangent)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(F.silu(wide), wide, cotangent.double())
    assert found.measured == pytest.approx(float((grad.double() - exact).square().sum()), rel=1e-4)
    assert found.reference == pytest.approx(float(exact.square().sum()), rel=1e-9)
    with pytest.raises(ValueError, match="weight: shape"):
        stash_error(codec, x, codec.encode(x, seed=3), weight=cotangent[1:])


def test_a_biased_stash_is_told(normal) -> None:
    codec, x = build_codec(CodecName.eight_bit_token), normal(40, 100)
    encoded = codec.encode(x, seed=3)
    lower = encoded.with_payload((encoded.payload[0].clamp(min=1) - 1, encoded.payload[1]))
    assert stash_error(codec, x, lower).measured > 2 * stash_error(codec, x, lower).predicted


def test_clamped_elements_are_counted_and_predicted(normal) -> None:
    codec, x = EightBitPerHead(), normal(200, 1, 50)
    given = HeadRange(torch.tensor([-2.0]), torch.tensor([2.0]))
    found = stash_error(codec, x, codec.encode(x, seed=3, head_range=given))
    assert found.clamped_share == pytest.approx(float((x.abs() > 2).double().mean()), rel=0.05)
    assert found.measured == pytest.approx(found.predicted, rel=0.02)


def test_an_empty_stash() -> None:
    codec, x = build_codec(CodecName.derivative_silu), torch.empty(0, 4)
    found = stash_error(codec, x, codec.encode(x, seed=3))
    assert (found.measured, found.predicted, found.clamped_share) == (0.0, 0.0, 0.0)
