"""The solver's baseline, and what it falls back to: changes of several layers at once while they help. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.platform.planning.judge import Numbers, Prices, judge
from headrace.platform.planning.problem import Layers, Problem


def greedy(problem: Problem, start: Layers | None = None) -> Layers | None:
    """The best assignment that it finds, None where it finds none that holds the budgets.

    It takes the change of one treatment into another, of n / 2^k layers, that helps most, until none does. Plans above
    a budget count as worse the further they are above it.

    Args:
        start: None: the best plan that treats all layers alike.
    """
    prices = Prices.of(problem)
    fixed = np.flatnonzero(prices.away == 0)  # the last layer moves nothing
    tried = _alike(problem, prices, fixed)
    if start is not None:
        tried = np.bincount(start[:-1], minlength=len(problem.columns))[None], np.array(start[-1:])
    best: tuple[tuple[float, ...], Numbers, Any] | None = None
    while len(tried[1]):
        judged = judge(problem, prices, *tried)
        number = judged.best()
        if best is not None and judged.at(number) >= best[0]:
            break
        best = judged.at(number), tried[0][number], tried[1][number]
        tried = _changes(best[1], int(best[2]), fixed)
    assert best is not None
    counts = dict(enumerate(map(int, best[1])))
    layers = problem.arranged(counts, int(best[2]))
    return layers if problem.excess(layers) == 0 else None


def _alike(problem: Problem, prices: Prices, fixed: Numbers) -> tuple[Numbers, Numbers]:
    num = len(problem.columns)
    tops = np.where(prices.away == 0, np.arange(num), fixed[0])
    return np.eye(num, dtype=int) * (problem.cost.num_layers - 1), tops


def _changes(counts: Numbers, top: int, fixed: Numbers) -> tuple[Numbers, Numbers]:
    """Another last layer, or n / 2^k of the n layers of one column treated as another one says."""
    others, num = fixed[fixed != top], len(counts)
    steps = []
    for source in np.flatnonzero(counts):
        moved = int(counts[source])
        while moved:
            step = np.eye(num, dtype=int) * moved
            step[:, source] -= moved
            steps.append(np.delete(step, source, axis=0))
            moved //= 2
    changed = counts + np.concatenate([np.zeros((len(others), num), dtype=int), *steps])
    return changed, np.concatenate([others, np.full(len(changed) - len(others), top)])
