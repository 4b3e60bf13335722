"""Peaks and seconds of many assignments at once, from how many layers are treated each way. No torch.

The same laws as problem.py, which judges one assignment layer by layer; tests compare them. With prefetch_layers above
1 the device's peak is that of runs which are at least so long.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from headrace.platform.planning.problem import Problem
from headrace.storage.core.records import Medium

Numbers = np.ndarray[Any, np.dtype[Any]]


class Prices(NamedTuple):
    """Of every column, in bytes and FLOPs: a row for each field of BlockCost."""

    forward: Numbers
    backward: Numbers
    held: Numbers
    away: Numbers
    host: Numbers
    ssd: Numbers
    host_slots: Numbers
    ssd_slots: Numbers
    rerun_flops: Numbers

    @classmethod
    def of(cls, problem: Problem) -> Prices:
        """The prices of a problem's columns, in their order."""
        costs = [column.cost for column in problem.columns]
        return cls(*(np.array([getattr(cost, name) for cost in costs], dtype=float) for name in cls._fields))


class Judgement(NamedTuple):
    """Of every assignment what Problem.excess and Problem.rank say, most important first; seconds in ticks."""

    excess: Numbers
    unknown: Numbers
    seconds: Numbers
    rerun_flops: Numbers
    ssd: Numbers
    host: Numbers

    def best(self) -> int:
        """The number of the best assignment, of equals the first."""
        return int(np.lexsort(self[::-1])[0])

    def at(self, number: int) -> tuple[float, ...]:
        """The judgement of one assignment."""
        return tuple(float(values[number]) for values in self)


def judge(problem: Problem, prices: Prices, counts: Numbers, tops: Numbers) -> Judgement:
    """Of assignments.

    Args:
        counts: [assignments, columns]: how many layers but the last are treated so.
        tops: [assignments]: the column of the last layer.
    """
    device = _device_peaks(problem, prices, counts, tops)
    host, ssd, host_slots, ssd_slots, rerun = (
        counts @ values for values in (prices.host, prices.ssd, prices.host_slots, prices.ssd_slots, prices.rerun_flops)
    )
    rerun = rerun + prices.rerun_flops[tops]
    seconds = _seconds(problem, prices, counts, (host, ssd, rerun))
    excess = np.zeros(len(tops))
    budgets = problem.budgets
    for tier, wanted in ((Medium.hbm, device), (Medium.host, host_slots), (Medium.ssd, ssd_slots)):
        if (there := budgets[tier]) is not None:
            excess += np.maximum(0, wanted - there) / max(1, there)
    if budgets.memory is not None:
        room = budgets.memory - budgets.process_bytes - budgets.device_is_memory * device
        # As a share of what memory has, in which processes and device are.
        excess += np.where(host_slots > room, (host_slots - room) / max(1, budgets.memory), 0)
    if (wear := problem.ssd_wear_bytes_per_s) is not None and problem.knows_ssd:
        excess += np.maximum(0, ssd - wear * seconds * (1 + 1e-9)) / np.maximum(1, wear * seconds)
    unknown = np.zeros(len(tops)) if problem.knows_ssd else ssd
    return Judgement(excess, unknown, np.rint(seconds / problem.tick_s), rerun, ssd, host)


def _device_peaks(problem: Problem, prices: Prices, counts: Numbers, tops: Numbers) -> Numbers:
    cost, ahead, present = problem.cost, problem.prefetch_layers, counts > 0
    until = np.cumsum(counts * prices.held, axis=1)
    before = until - counts * prices.held
    last = np.maximum.accumulate(np.where(present, np.arange(counts.shape[1]), -1), axis=1)
    away = np.where(last >= 0, prices.away[last], 0.0)
    came = np.concatenate([np.zeros((len(tops), 1)), away[:, :-1]], axis=1)
    stays = until[:, -1] + prices.held[tops]
    needs = [(1, prices.forward), (ahead, prices.backward)]
    if ahead == 1:
        needs = [(1, np.maximum(prices.forward, prices.backward))]
    peak = stays + max(problem.norm.forward, problem.norm.backward)
    for times, need in needs:
        end = until - prices.held + need + np.where(counts > 1, times * prices.away, 0.0)
        first = before + times * came + need
        at_work = np.where(present, np.maximum(end, first), 0.0).max(axis=1)
        peak = np.maximum(peak, np.maximum(at_work, until[:, -1] + times * away[:, -1] + need[tops]))
    peak = np.maximum(peak, stays + max(0, ahead - 1) * away[:, -1] + problem.norm.backward)
    head = stays + problem.norm.held + cost.head_bytes
    return cost.fixed_bytes + np.maximum(peak + cost.block_transient_bytes, head + cost.head_transient_bytes)


def _seconds(problem: Problem, prices: Prices, counts: Numbers, moved: tuple[Numbers, Numbers, Numbers]) -> Numbers:
    cost, rates, (host, ssd, rerun) = problem.cost, problem.rates, moved
    moves = prices.away > 0
    number = counts @ moves.astype(float)
    again = np.where((counts > 0) & moves, prices.rerun_flops, 0.0).max(axis=1)
    store_window = np.where(number > 0, number + 1, 0) * cost.block_flops
    load_window = number * cost.backward_flops + counts @ (prices.rerun_flops * moves) - again
    store_s = np.maximum(_over(host + ssd, rates.d2h), _over(ssd, rates.ssd_write))
    load_s = np.maximum(_over(host + ssd, rates.h2d), _over(ssd, rates.ssd_read))
    stores = np.maximum(0.0, store_s - _over(store_window, rates.flops))
    loads = np.maximum(0.0, load_s - bool(problem.prefetch_layers) * _over(load_window, rates.flops))
    return _over(cost.whole_flops + rerun, rates.flops) + stores + loads


def _over(amount: Any, rate: float | None) -> Any:
    return 0.0 * amount if rate is None else amount / rate
