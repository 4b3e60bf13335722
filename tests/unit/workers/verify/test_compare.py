"""The error measure: closed forms, noise, and values that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.workers.verify.compare import (
    NOT_FINITE,
    bit_equal,
    block_errors,
    block_of,
    gradient_errors,
    largest,
    medians,
    ratio,
    relative,
)

A, B, E = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias", "model.embed_tokens.weight"


def test_relative_error_is_the_norm_of_the_difference_over_the_norm_of_the_reference() -> None:
    reference = {A: torch.tensor([3.0, 4.0]).double(), E: torch.tensor([1.0]).double()}
    grads = {A: torch.tensor([3.0, 4.5]).double(), E: torch.tensor([1.0]).double()}
    errors = gradient_errors(grads, reference)
    assert errors.params == {A: pytest.approx(0.1), E: 0.0}
    assert errors.noise == frozenset()
    assert errors.whole == pytest.approx(0.5 / math.sqrt(26.0))
    assert largest(errors.params)[0] == A


def test_a_small_gradient_that_is_not_noise_is_judged_by_its_own_norm() -> None:
    reference = {A: torch.tensor([1.0]).double(), B: torch.tensor([1e-9]).double()}
    grads = {A: torch.tensor([1.0]).double(), B: torch.tensor([1.1e-9]).double()}
    assert gradient_errors(grads, reference).params[B] == pytest.approx(0.1)


def test_noise_is_judged_by_its_block_and_named() -> None:
    reference = {A: torch.tensor([2.0]).double(), B: torch.tensor([1e-17]).double(), E: torch.tensor([1e3]).double()}
    grads = {A: torch.tensor([2.0]).double(), B: torch.tensor([-3e-17]).double(), E: torch.tensor([1e3]).double()}
    errors = gradient_errors(grads, reference)
    assert errors.noise == {B}
    assert errors.params[B] == pytest.approx(2e-17)
    # a gradient where there should be none is seen, however small beside the rest of the model
    grads[B] = torch.tensor([1e-9]).double()
    assert gradient_errors(grads, reference).params[B] == pytest.approx(5e-10)


def test_what_counts_as_noise_depends_on_the_precision_of_the_reference() -> None:
    reference = {A: torch.tensor([1.0]), B: torch.tensor([1e-6])}
    assert gradient_errors(reference, reference).noise == {B}
    assert gradient_errors(reference, reference, noise_dtype=torch.float64).noise == frozenset()


def test_all_zero_references() -> None:
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    assert gradient_errors({A: zero, B: zero}, {A: zero, B: zero}).params == {A: 0.0, B: 0.0}
    assert gradient_errors({A: zero, B: one}, {A: zero, B: zero}).params[B] == pytest.approx(1.0)
    # the block has no gradient at all, the rest of the model has
    assert gradient_errors({A: one, E: one}, {A: zero, E: one}).params[A] == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_fails_every_bound(value: float) -> None:
    reference = {A: torch.ones(2).double()}
    errors = gradient_errors({A: torch.tensor([1.0, value]).double()}, reference)
    assert errors.params[A] == errors.whole == NOT_FINITE
    assert relative(value, 1.0) == NOT_FINITE


def test_other_parameters_or_shapes_are_an_error() -> None:
    with pytest.raises(KeyError, match=r"k_proj\.bias"):
        gradient_errors({A: torch.ones(1)}, {A: torch.ones(1), B: torch.ones(1)})
    with pytest.raises(ValueError, match=r"shape \(1,\), reference \(2,\)"):
        gradient_errors({A: torch.ones(1)}, {A: torch.ones(2)})


def test_blocks() -> None:
    assert block_of("model.layers.11.self_attn.q_proj.weight") == "model.layers.11"
    assert block_of("model.embed_tokens.weight") == block_of("lm_head.weight") == ""
    errors = block_errors(
        {A: torch.tensor([3.3]), B: torch.tensor([4.0])}, {A: torch.tensor([3.0]), B: torch.tensor([4.0])}
    )
    assert errors == {"model.layers.0": pytest.approx(0.06)}


def test_bits() -> None:
    assert bit_equal({A: torch.tensor([0.0])}, {A: torch.tensor([0.0])})
    assert not bit_equal({A: torch.tensor([0.0])}, {A: torch.tensor([-0.0])})
    assert not bit_equal({A: torch.ones(1)}, {A: torch.ones(1).double()})
    assert not bit_equal({A: torch.ones(1)}, {})


def test_ratio_and_median() -> None:
    assert ratio(0.0, 0.0) == 0.0
    assert ratio(1.0, 0.0) == NOT_FINITE
    assert medians([{"a": 3.0}, {"a": 1.0}, {"a": 2.0}]) == {"a": 2.0}
