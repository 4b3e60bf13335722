"""What the codec tests share: is a stochastic code right on average, and of the predicted variance?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

NUM_DRAWS = 400


@pytest.fixture(scope="session")
def standard_errors() -> Callable[..., float]:
    """standard_errors(draws, exact, variance): how far the mean of the draws is from exact, in standard errors.

    The draws (NUM_DRAWS, ...) are weighed with fixed signs and summed, so that small errors of one sign add up.
    """

    def find(draws: torch.Tensor, exact: torch.Tensor, variance: torch.Tensor) -> float:
        assert len(draws) == NUM_DRAWS
        worst = 0.0
        ones = torch.ones(exact.shape, dtype=torch.float64)
        signs = torch.randint(0, 2, exact.shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
        for weight in (ones, signs, exact.double().sign()):
            off = (weight * (draws.double().mean(0) - exact.double())).sum().abs()
            worst = max(worst, float(off / (variance.sum() / NUM_DRAWS).sqrt()))
        return worst

    return find


@pytest.fixture(scope="session")
def variance_ratio() -> Callable[..., float]:
    """variance_ratio(draws, variance): the draws' variance over the prediction, both summed over elements."""

    def find(draws: torch.Tensor, variance: torch.Tensor) -> float:
        return float(draws.double().var(0).sum() / variance.sum())

    return find


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """normal(*shape): seeded normal numbers, fp32."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)
