"""Stochastic codes are right on average and vary as predicted; broken ones are found out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.codecs import grid, reference
from headrace.kernels.codecs.activations import Activation, derivative
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.derivative import FourBitSwiGLU
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.metrics import grid_of
from headrace.kernels.codecs.registry import build_codec
from headrace.kernels.codecs.s2a import gelu_s2a, silu_s2a, swiglu_s2a

NUM_DRAWS = 400
NAMES = list(CodecName)
Find = Callable[..., float]


def draw_at_once(name: CodecName, x: torch.Tensor, rounding: Rounding = Rounding.stochastic) -> torch.Tensor:
    """NUM_DRAWS codes of x (R, C) under one seed: places, and with them the random numbers, all differ."""
    codec = build_codec(name, rounding)
    many = x.expand(NUM_DRAWS, *x.shape)
    return codec.decode(codec.encode(many, seed=5))


def exact_and_variance(name: CodecName, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codec stands for, and h^2 p (1 - p) of stochastic rounding, in fp64."""
    codec = build_codec(name)
    low, step = grid_of(codec, codec.encode(x, seed=0))
    exact = x.double()
    if name.value.startswith("derivative"):
        exact = derivative(exact, next(a for a in Activation if a.codec is name))
    place = (exact - low) / step
    share = place - place.floor()
    return exact, (step.square() * share * (1 - share)).expand(exact.shape)


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_with_the_predicted_variance(
    name: CodecName, normal, standard_errors: Find, variance_ratio: Find
) -> None:
    x = normal(6, 50)
    exact, variance = exact_and_variance(name, x)
    draws = draw_at_once(name, x)
    assert standard_errors(draws, exact, variance) < 4
    assert abs(variance_ratio(draws, variance) - 1) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_nearest_is_biased_and_does_not_vary(name: CodecName, normal, standard_errors: Find) -> None:
    x = normal(6, 50)
    exact, variance = exact_and_variance(name, x)
    draws = draw_at_once(name, x, Rounding.nearest)
    assert torch.equal(draws[0], draws[-1])
    assert standard_errors(draws, exact, variance) > 4


@pytest.mark.parametrize("name", [CodecName.eight_bit_token, CodecName.four_bit_group, CodecName.derivative_silu])
def test_mutants_of_the_rounding_are_found_out(
    name: CodecName, normal, standard_errors: Find, variance_ratio: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(6, 50)
    exact, variance = exact_and_variance(name, x)

    def random_numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "thresholds", lambda *a: change(grid.thresholds(*a)))
            return draw_at_once(name, x)

    assert standard_errors(random_numbers(lambda u: u), exact, variance) < 4
    assert standard_errors(random_numbers(lambda u: 0.95 * u), exact, variance) > 4
    assert standard_errors(random_numbers(torch.ones_like), exact, variance) > 4
    shared = random_numbers(lambda u: u.flatten()[0].expand_as(u))
    assert variance_ratio(shared, variance) < 0.05


GROUP = 16
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "silu": silu_s2a,
    "gelu_erf": gelu_s2a,
    "gelu_tanh": lambda x, seed: gelu_s2a(x, seed=seed, approximate="tanh"),
    "swiglu": lambda gate, up, seed: swiglu_s2a(gate, up, seed=seed, group_size=GROUP),
}
ORACLES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": lambda gate, up: F.silu(gate) * up,
}


def gradients(
    call: Callable[..., torch.Tensor], inputs: list[torch.Tensor], cotangent: torch.Tensor
) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(call(*leaves), leaves, cotangent))


def variances(kind: str, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """Of every gradient: the cotangent's square times that of the code."""
    square = cotangent.double().square()
    if kind != "swiglu":
        return [square * exact_and_variance(CodecName[f"derivative_{kind}"], inputs[0])[1]]
    gate, up = (tensor.double() for tensor in inputs)
    factors = (up * derivative(gate, Activation.silu), F.silu(gate))
    found = []
    for factor, code in zip(factors, FourBitSwiGLU(group_size=GROUP).encode(*inputs, seed=0), strict=True):
        low, step = grid_of(FourBitPerGroup(group_size=GROUP), code)
        share = (factor - low) / step % 1
        found.append(square * step.square() * share * (1 - share))
    return found


@pytest.mark.parametrize(
    ("kind", "by_seed"),
    [
        *((kind, False) for kind in CALLS),
        ("silu", True),
        *(pytest.param(kind, True, marks=pytest.mark.soak) for kind in ("gelu_erf", "gelu_tanh", "swiglu")),
    ],
)
def test_gradients_of_s2a(kind: str, by_seed: bool, normal, standard_errors: Find, variance_ratio: Find) -> None:
    """The mean of 400 gradients, of 400 seeds or of 400 places under one seed, against fp64 autograd.

    23 columns are two groups of which the second is not full.
    """
    call, cotangent = CALLS[kind], normal(3, 23)
    inputs = [normal(3, 23) for _ in range(2 if kind == "swiglu" else 1)]
    if by_seed:
        runs = [gradients(lambda *x, s=seed: call(*x, seed=s), inputs, cotangent) for seed in range(NUM_DRAWS)]
        draws = [torch.stack(found) for found in zip(*runs, strict=True)]
    else:
        many = [tensor.expand(NUM_DRAWS, 3, 23) for tensor in (*inputs, cotangent)]
        draws = gradients(lambda *x: call(*x, seed=9), many[:-1], many[-1])
    exact = gradients(ORACLES[kind], [tensor.double() for tensor in inputs], cotangent.double())
    expected = variances(kind, inputs, cotangent)
    for got, mean, variance in zip(draws, exact, expected, strict=True):
        assert standard_errors(got, mean, variance) < 4
        assert abs(variance_ratio(got, variance) - 1) < 0.05
    if kind == "swiglu":
        assert abs(error_correlation(draws, tuple(exact))) < 0.03


def test_a_reused_seed_is_found_out(normal, variance_ratio: Find) -> None:
    x, cotangent = normal(3, 23), normal(3, 23)
    draws = torch.stack([gradients(lambda t: silu_s2a(t, seed=4), [x], cotangent)[0] for _ in range(5)])
    assert variance_ratio(draws, variances("silu", [x], cotangent)[0]) < 1e-6


def error_correlation(draws: list[torch.Tensor], exact: tuple[torch.Tensor, ...]) -> float:
    """Between the errors of gate's and of up's gradient, each with the sign of its cotangent taken out."""
    first, second = (got.double() - expected for got, expected in zip(draws, exact, strict=True))
    return float((first * second).sum() / (first.norm() * second.norm()))


def test_one_stream_for_both_codes_of_swiglu_is_found_out(normal, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = normal(400, 32), normal(400, 32)
    exact = (up.double() * derivative(gate.double(), Activation.silu), F.silu(gate.double()))

    def correlation() -> float:
        codes = FourBitSwiGLU(group_size=16).encode(gate, up, seed=3)
        return error_correlation([FourBitPerGroup(group_size=16).decode(one) for one in codes], exact)

    assert abs(correlation()) < 4 / gate.numel() ** 0.5
    encode_groups = reference.encode_groups
    monkeypatch.setattr(reference, "encode_groups", lambda x, size, seed, stream: encode_groups(x, size, seed, 0))
    assert correlation() > 0.2
