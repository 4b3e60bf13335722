from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from headrace.platform.planning.problem import Layers, Problem


@pytest.fixture(scope="session")
def brute_force() -> Callable[[Problem], tuple[tuple[float, ...], Layers] | None]:
    """The best of all assignments in all orders that hold the budgets; the last layer moves nothing."""

    def best(problem: Problem) -> tuple[tuple[float, ...], Layers] | None:
        every = itertools.product(range(len(problem.columns)), repeat=problem.cost.num_layers)
        fitting = (it for it in every if not problem.columns[it[-1]].cost.away and not problem.excess(it))
        return min(((problem.rank(layers), layers) for layers in fitting), default=None)

    return best
