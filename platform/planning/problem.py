"""What the solver is asked: layers, treatments and budgets; and the judgement of one assignment. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from headrace.platform.planning.budgets import Budgets
from headrace.platform.planning.columns import Column
from headrace.platform.planning.predict import (
    BlockCost,
    Rates,
    StepCost,
    Work,
    device_peak_bytes,
    missing_rates,
    step_seconds,
    tier_bytes,
)
from headrace.storage.core.records import Medium

# Plans whose steps differ by less than this share count as equally fast.
GAP = 5e-4
# The treatment of every layer in forward order, as numbers of columns.
Layers = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """Layers that are alike, each to be treated as one of the columns says.

    A plan's seconds and slab bytes depend only on how many layers are treated each way. Its device peak depends on
    the order too, which is a rule: first come the layers whose bytes, those that move among them, shrink most between
    their own work and that of others, so what stays is not there before it must be. The last layer moves nothing: its
    backward starts at once.

    Args:
        found: the treatments; `columns` has them in the order of the layers.
        ssd_wear_bytes_per_s: that the drives may be written with, by this rank; None: no limit.
    """

    found: tuple[Column, ...]
    cost: StepCost
    budgets: Budgets
    rates: Rates
    prefetch_layers: int
    ssd_wear_bytes_per_s: float | None = None

    @property
    def norm(self) -> BlockCost:
        """The final norm: above it nothing of the layers is under way but what the last one moves.

        Only the last rank of a pipeline has one: elsewhere it takes nothing.
        """
        return self.cost.norm or BlockCost(0, 0, 0)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """In the order of the layers."""
        return tuple(sorted(self.found, key=lambda column: _turn(column.cost)))

    @cached_property
    def knows_ssd(self) -> bool:
        """Whether the seconds of the SSD can be predicted."""
        return not missing_rates(Work(0.0, ssd=1, load_ssd=1), self.rates)

    def blocks(self, layers: Layers) -> list[BlockCost]:
        """The price of every layer."""
        return [self.columns[number].cost for number in layers]

    def arranged(self, counts: Mapping[int, int], top: int) -> Layers:
        """The layers in their order: so many of every column, and the last one.

        Columns that the device cannot tell apart take turns, so that all links work all the time.
        """
        numbers = [number for number in sorted(counts) if counts[number]]
        layers: list[int] = []
        for _, group in groupby(numbers, key=lambda number: _turn(self.columns[number].cost)):
            layers += _in_turns({number: counts[number] for number in group})
        return (*layers, top)

    def work(self, layers: Layers) -> Work:
        """What a micro-batch does beside the model's own compute."""
        return Work.of(self.blocks(layers), self.prefetch_layers, self.cost)

    def wanted(self, layers: Layers) -> dict[Medium, int]:
        """Peak of every tier."""
        blocks = self.blocks(layers)
        return {Medium.hbm: device_peak_bytes(blocks, self.prefetch_layers, self.cost), **tier_bytes(blocks)}

    @property
    def tick_s(self) -> float:
        """Steps that differ by less are equal: sums of floats in another order are."""
        whole = self.cost.whole_flops / self.rates.flops if self.rates.flops else 0.0
        return 1e-9 * max(whole, 1e-3)

    def seconds(self, work: Work) -> float:
        """Of one micro-batch."""
        return step_seconds(work, self.prefetch_layers, self.cost, self.rates).total

    def is_fastest(self, layers: Layers) -> bool:
        """Whether nothing can be faster: they compute nothing again, and no transfer is exposed."""
        work = self.work(layers)
        exposed = step_seconds(work, self.prefetch_layers, self.cost, self.rates).exposed
        return work.rerun_flops == 0 and exposed == 0 and (self.knows_ssd or work.ssd == 0)

    def excess(self, layers: Layers) -> float:
        """How far the layers are above the budgets, as a sum of shares; 0 where they fit."""
        over = self.budgets.excess(self.wanted(layers))
        if self.ssd_wear_bytes_per_s is not None and self.knows_ssd:
            work = self.work(layers)
            may = self.ssd_wear_bytes_per_s * self.seconds(work)
            over += max(0.0, work.ssd - may * (1 + 1e-9)) / max(1.0, may)
        return over

    def rank(self, layers: Layers) -> tuple[float, ...]:
        """What the solver minimises, most important first: bytes of unknown seconds, ticks, FLOPs, bytes moved."""
        work = self.work(layers)
        unknown = 0 if self.knows_ssd else work.ssd
        return (unknown, round(self.seconds(work) / self.tick_s), work.rerun_flops, work.ssd, work.host)


def _turn(cost: BlockCost) -> tuple[float, float, float]:
    """Layers with lower numbers come first."""
    return (cost.held - cost.away - max(cost.forward, cost.backward), -cost.away, cost.held)


def _in_turns(counts: Mapping[int, int]) -> Iterator[int]:
    """Every number so often, spread evenly."""
    places = ((place + 0.5) / count for count in counts.values() for place in range(count))
    numbers: Sequence[int] = [number for number, count in counts.items() for _ in range(count)]
    return (number for _, number in sorted(zip(places, numbers, strict=True)))
