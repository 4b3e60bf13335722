"""The layer treatments that the solver chooses from: layer plans generated from the skeleton, priced, pruned. No torch.

A treatment says for every group of tensors that move together (the block's input; q, k, v; attention's results; the
residual; gate and up) where it waits or that it is computed again. What costs more than another in every respect is
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

from headrace.platform.planning.cost import BlockShape
from headrace.platform.planning.predict import BlockCost
from headrace.workers.memory.plan import LayerPlan, Residence, Stretch
from headrace.workers.memory.schedule import Schedule
from headrace.workers.model.head_groups import whole_name
from headrace.workers.model.skeleton import Kind

# A share of the tokens that is computed again is a multiple of one over this.
NUM_SHARES = 4
# Of more groups than these not all sets are priced.
MOST_GROUPS = 6

Group = tuple[str, ...]


class Column(NamedTuple):
    """A layer plan and its price."""

    plan: LayerPlan
    cost: BlockCost


def columns(shape: BlockShape, places: Sequence[Residence], more: Iterable[LayerPlan] = ()) -> tuple[Column, ...]:
    """The treatments of one block that no other one beats in every respect.

    Args:
        places: where tensors may wait.
        more: layer plans to price beside the generated ones, for example those of the presets.
    """
    first, *others = groups(shape.schedule)
    sets = _useful_sets(shape, first, others)
    plans = dict.fromkeys([*_whole(first, sets, places), *more])
    mixed = [group for group in others if _is_mixed(shape.schedule, group)]
    plans |= dict.fromkeys(_split(shape, first, mixed, [g for g in others if g not in mixed], places))
    return pruned([Column(plan, shape.cost(plan)) for plan in plans])


def groups(schedule: Schedule) -> list[Group]:
    """Skeletal tensors that move together: the inputs, then those that are placed at one moment, in forward order.

    Head groups of one tensor are together.
    """
    inputs = tuple(schedule.skeleton.inputs)
    found: dict[frozenset[str], list[str]] = {}
    for moment in schedule.moments:
        names = [name for name in moment.names if name not in inputs]
        if names:
            found.setdefault(frozenset(map(whole_name, names)), []).extend(names)
    return [inputs, *map(tuple, found.values())]


def pruned(found: Sequence[Column]) -> tuple[Column, ...]:
    """Those that no other one beats; of several with one price the first."""
    unlike = list({_price(column.cost): column for column in reversed(found)}.values())[::-1]
    prices = [_price(column.cost) for column in unlike]
    return tuple(
        column
        for column, price in zip(unlike, prices, strict=True)
        if not any(other != price and all(map(float.__le__, other, price)) for other in prices)
    )


def _price(cost: BlockCost) -> tuple[float, ...]:
    numbers = (cost.forward, cost.backward, cost.held, cost.host, cost.ssd, cost.host_slots, cost.ssd_slots)
    return (*map(float, numbers), float(cost.rerun_flops))


def _useful_sets(shape: BlockShape, first: Group, others: Sequence[Group]) -> list[list[Group]]:
    """The sets of groups to hold, such that no other set is smaller and computes less again."""
    sizes = range(len(others) + 1) if len(others) < MOST_GROUPS else (0, 1, len(others) - 1, len(others))
    sets = [[*chosen] for size in sizes for chosen in combinations(others, size)]
    priced = {}
    for chosen in sets:
        plan = LayerPlan.of(**dict.fromkeys((*first, *sum(chosen, ())), Residence.hbm))
        priced[plan] = chosen
    return [priced[column.plan] for column in pruned([Column(plan, shape.cost(plan)) for plan in priced])]


def _whole(first: Group, sets: Iterable[Sequence[Group]], places: Sequence[Residence]) -> Iterator[LayerPlan]:
    """All tokens of what is held in one place."""
    for chosen, place in product(sets, places):
        yield LayerPlan.of(**dict.fromkeys((*first, *sum(chosen, ())), place))


def _split(
    shape: BlockShape, first: Group, mixed: Sequence[Group], others: Sequence[Group], places: Sequence[Residence]
) -> Iterator[LayerPlan]:
    """Input and results of attention in one place; of the others the front is computed again, the rest in another.

    MEMO's rule (arXiv 2407.12117, section 4.1), with any place: under a causal mask the front is the cheap part, and
    what is computed again costs the same wherever it lies.
    """
    always, rest = (*first, *sum(mixed, ())), sum(others, ())
    num_tiles = len(shape.cuts.tiles(shape.rows))
    fronts = {num_tiles * share // (2 * NUM_SHARES): share for share in range(2 * NUM_SHARES)}
    for (front, share), place, other in product(fronts.items(), places, places):
        if (share % 2 or front == 0) and (place is other) == (front == 0):
            continue
        if not rest or shape.schedule.skeleton.segments[0].kind is Kind.opaque:
            continue
        end = front * shape.cuts.token_tile
        row = [Stretch(0, end, Residence.recompute)] if front else []
        row.append(Stretch(end, None, other))
        yield LayerPlan({**LayerPlan.of(**dict.fromkeys(always, place)).stretches, **dict.fromkeys(rest, tuple(row))})


def _is_mixed(schedule: Schedule, group: Group) -> bool:
    makers = [schedule.skeleton.maker[name] for name in group]
    return all(maker.kind is Kind.mix for maker in makers)
