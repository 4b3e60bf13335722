"""Next-use eviction against brute force: all sets of victims, and all ways to run a small cache."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable

import pytest

from headrace.storage.core.errors import TierFull
from headrace.storage.core.ledger import PAGE_BYTES, Ledger

NUM_BLOCKS = 12


def random_table(chance: random.Random, sizes: Iterable[int]) -> Ledger:
    """A full table with holes knocked into it, slots that may go or not, next uses with ties and unknown ones."""
    table = Ledger("host", NUM_BLOCKS * PAGE_BYTES)
    for key, size in enumerate(sizes):
        try:
            table.prepare(key, size * PAGE_BYTES, next_use=chance.choice((None, *range(8))))
        except TierFull:
            break
        if chance.random() < 0.9:
            table.offer(key)
    for key in table:
        if table.slot(key).evictable:
            fate = chance.random()
            if fate < 0.15:
                table.withdraw(key)
            elif fate < 0.35:
                table.free(key)
    return table


def makes_room(table: Ledger, freed: Iterable[object], num_blocks: int) -> bool:
    """Whether `num_blocks` in a row belong to nobody or to one of the freed."""
    gone, taken = set(freed), [False] * NUM_BLOCKS
    for key in table:
        slot = table.slot(key)
        first = slot.offset_bytes // PAGE_BYTES
        for block in range(first, first + slot.num_bytes // PAGE_BYTES):
            taken[block] = key not in gone
    return "." * num_blocks in "".join("x" if block else "." for block in taken)


def soonest_first(table: Ledger) -> list[object]:
    """Keys of the blocks that may go, those to be spared first in front: needed soonest, then youngest."""
    may_go = [key for key in table if table.slot(key).evictable]  # oldest first
    uses = {key: table.slot(key).next_use for key in may_go}
    may_go.reverse()
    may_go.sort(key=lambda key: math.inf if uses[key] is None else uses[key])
    return may_go


def all_sets(keys: list[object]) -> list[tuple[object, ...]]:
    return [chosen for count in range(len(keys) + 1) for chosen in itertools.combinations(keys, count)]


def check_against_all_sets(table: Ledger, num_blocks: int) -> bool:
    """Compare one answer with the best of all sets; whether it named somebody."""
    keys = soonest_first(table)
    enough = [chosen for chosen in all_sets(keys) if makes_room(table, chosen, num_blocks)]
    found = table.victims(num_blocks * PAGE_BYTES)
    if not enough:
        assert found is None
        return False
    assert found is not None
    best = min(enough, key=lambda chosen: [key in chosen for key in keys])
    assert found == list(reversed(best)), "another set spares blocks that are needed sooner"
    assert set(found) <= set(keys)
    assert not any(set(chosen) < set(found) for chosen in enough), "a part of the victims would have been enough"
    return bool(found)


@pytest.mark.parametrize("seed", range(4))
def test_unequal_blocks_against_all_sets(seed: int) -> None:
    chance, named = random.Random(seed), 0
    for _ in range(40):
        table = random_table(chance, [chance.randint(1, 4) for _ in range(NUM_BLOCKS)])
        named += sum(check_against_all_sets(table, num_blocks) for num_blocks in range(1, NUM_BLOCKS + 2))
        table.check()
    assert named > 100


def test_equal_blocks_against_all_sets() -> None:
    """A request of a block's size in a table without a hole names one block, and none has its next use later."""
    chance, named = random.Random(4), 0
    for _ in range(300):
        table = random_table(chance, [2] * NUM_BLOCKS)
        if not check_against_all_sets(table, 2):
            continue
        (key,) = table.victims(2 * PAGE_BYTES) or []
        use = table.slot(key).next_use
        assert use is None or all(table.slot(other).next_use in range(int(use) + 1) for other in soonest_first(table))
        named += 1
    assert named > 20


def misses(table: Ledger, requests: list[int]) -> int:
    """Blocks brought in to serve the requests in order, with the table as a cache that knows them all."""
    count = 0
    for now, key in enumerate(requests):
        later = [then for then in range(now + 1, len(requests)) if requests[then] == key]
        if key not in table:
            count += 1
            for victim in table.victims(PAGE_BYTES) or []:
                table.free(victim)
            table.prepare(key, PAGE_BYTES)
            table.offer(key)
        table.set_next_use(key, later[0] if later else None)
    return count


def fewest_misses(requests: list[int], capacity: int) -> int:
    """The same over every choice of what goes."""
    costs = {frozenset[int](): 0}
    for key in requests:
        after: dict[frozenset[int], int] = {}
        for cached, cost in costs.items():
            if key in cached:
                options = [(cached, cost)]
            elif len(cached) < capacity:
                options = [(cached | {key}, cost + 1)]
            else:
                options = [(cached - {victim} | {key}, cost + 1) for victim in cached]
            for option, total in options:
                after[option] = min(total, after.get(option, total))
        costs = after
    return min(costs.values())


class NearestFirst(Ledger):
    """Evicts what is needed soonest."""

    def victims(self, num_bytes: int) -> list | None:
        self._evictable.reverse()
        try:
            return super().victims(num_bytes)
        finally:
            self._evictable.reverse()


def test_no_choice_of_victims_brings_back_fewer_equal_blocks() -> None:
    chance, worse = random.Random(5), 0
    for _ in range(200):
        requests, capacity = [chance.randrange(6) for _ in range(16)], chance.randint(1, 4)
        fewest = fewest_misses(requests, capacity)
        assert misses(Ledger("host", capacity * PAGE_BYTES), requests) == fewest
        worse += misses(NearestFirst("host", capacity * PAGE_BYTES), requests) > fewest
    assert worse > 100, "sequences on which any choice is best show nothing"


def test_a_full_table_of_20_000_slots_is_asked_again_and_again() -> None:
    """A sort or a scan of the table per request would take minutes here."""
    num_slots, chance = 20_000, random.Random(6)
    table = Ledger("host", num_slots * PAGE_BYTES)
    begin_s = time.process_time()
    for key in range(2 * num_slots):
        for victim in table.victims(PAGE_BYTES) or []:
            table.free(victim)
        table.prepare(key, PAGE_BYTES, next_use=chance.random())
        table.offer(key)
    assert time.process_time() - begin_s < 20
    table.check()
    assert len(table) == num_slots
