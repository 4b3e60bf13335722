"""The slot table against a dictionary, over random operations; and broken tables that this must find."""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import pytest

from headrace.storage.core.errors import TierFull
from headrace.storage.core.ledger import PAGE_BYTES, Ledger, Slot, round_up

NUM_BLOCKS = 96


@dataclass
class Entry:
    offset: int
    size: int
    next_use: float | None
    evictable: bool = False


class Model:
    """The same table, the slow and obvious way: one owner per block of the range."""

    def __init__(self) -> None:
        self.owner: list[int | None] = [None] * NUM_BLOCKS
        self.entries: dict[int, Entry] = {}  # oldest first
        self.peak = 0

    @property
    def used(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def holes(self, without: set[int] | frozenset[int] = frozenset()) -> list[tuple[int, int]]:
        """Size and offset in bytes of all runs of blocks that belong to nobody, or to one of `without`."""
        found, run = [], 0
        for block, owner in enumerate([*self.owner, -1]):
            if owner is None or owner in without:
                run += 1
            elif run:
                found.append((run * PAGE_BYTES, (block - run) * PAGE_BYTES))
                run = 0
        return found

    def largest_hole(self, without: set[int] | frozenset[int] = frozenset()) -> int:
        return max((size for size, _ in self.holes(without)), default=0)

    def place(self, size: int) -> int | None:
        """Where a slot goes: the smallest hole that is large enough."""
        return min((hole for hole in self.holes() if hole[0] >= size), default=(0, None))[1]

    def victims(self, size: int) -> list[int] | None:
        """Start from all that may go; spare one after the other, needed soonest first, while the hole stays."""
        ages = {key: age for age, key in enumerate(self.entries)}
        may_go = [key for key, entry in self.entries.items() if entry.evictable and entry.size]
        may_go.sort(key=lambda key: (_use(self.entries[key]), -ages[key]))
        chosen = set(may_go)
        if self.largest_hole(chosen) < size:
            return None
        for key in may_go:
            if self.largest_hole(chosen - {key}) >= size:
                chosen.remove(key)
        return [key for key in reversed(may_go) if key in chosen]

    def take(self, key: int, entry: Entry) -> None:
        for block in range(entry.offset // PAGE_BYTES, (entry.offset + entry.size) // PAGE_BYTES):
            assert self.owner[block] is None, f"block {block} of {key} belongs to {self.owner[block]}"
            self.owner[block] = key
        self.entries[key] = entry
        self.peak = max(self.peak, self.used)

    def give_back(self, key: int) -> None:
        entry = self.entries.pop(key)
        for block in range(entry.offset // PAGE_BYTES, (entry.offset + entry.size) // PAGE_BYTES):
            self.owner[block] = None


def _use(entry: Entry) -> float:
    return math.inf if entry.next_use is None else entry.next_use


class Walk:
    """Random operations on both; illegal ones too, which must change nothing."""

    VERBS = ("prepare",) * 4 + ("offer",) * 5 + ("withdraw",) * 2 + ("free", "set_next_use") + ("evict",) * 2

    def __init__(self, seed: int, ledger: type[Ledger]) -> None:
        self.random = random.Random(seed)
        self.table, self.model = ledger("host", NUM_BLOCKS * PAGE_BYTES), Model()
        self.next_key = 0
        self.evicted = self.refusals = 0

    def step(self) -> None:
        verb = self.random.choice(self.VERBS)
        if verb == "prepare":
            self.prepare(self._num_bytes())
        elif verb == "evict":
            self.evict()
        elif self.random.random() < 0.02:
            self.illegal()
        elif self.model.entries:
            key = self.random.choice(list(self.model.entries))
            if verb == "set_next_use":
                self.model.entries[key].next_use = next_use = self._next_use()
                self.table.set_next_use(key, next_use)
            else:
                self.turn(verb, key)

    def turn(self, verb: str, key: int) -> None:
        """One verb on a slot that is there."""
        getattr(self.table, verb)(key)
        if verb == "free":
            self.model.give_back(key)
        else:
            self.model.entries[key].evictable = verb == "offer"

    def prepare(self, num_bytes: int) -> None:
        key, self.next_key = self.next_key, self.next_key + 1
        size, next_use = round_up(num_bytes), self._next_use()
        place = self.model.place(size) if size else 0
        if place is None:
            self.refused(TierFull, key, lambda: self.table.prepare(key, num_bytes, next_use=next_use))
            return
        slot = self.table.prepare(key, num_bytes, next_use=next_use)
        assert (slot.offset_bytes, slot.num_bytes) == (place, size), "the slot is not where it fits best"
        self.model.take(key, Entry(place, size, next_use))

    def evict(self) -> None:
        num_bytes = self._num_bytes()
        victims = self.table.victims(num_bytes)
        assert victims == self.model.victims(round_up(num_bytes)), "the victims are others"
        if victims is None or self.random.random() < 0.3:
            return
        for key in victims:
            self.turn("free", key)
        self.evicted += len(victims)
        self.prepare(num_bytes)
        assert self.next_key - 1 in self.table, "the victims made no room"

    def illegal(self) -> None:
        """Keys that are not there or there already, and numbers that are none."""
        unknown, table = self.next_key, self.table
        verb = self.random.choice((table.offer, table.withdraw, table.free, table.slot))
        self.refused(KeyError, unknown, lambda: verb(unknown))
        self.refused(KeyError, unknown, lambda: table.set_next_use(unknown, 1.0))
        self.refused(ValueError, unknown, lambda: table.prepare(unknown, -1))
        self.refused(ValueError, unknown, lambda: table.prepare(unknown, 1, next_use=math.nan))
        self.refused(ValueError, unknown, lambda: table.victims(-1))
        for known in list(self.model.entries)[:1]:
            self.refused(RuntimeError, known, lambda known=known: table.prepare(known, 1))
            self.refused(ValueError, known, lambda known=known: table.set_next_use(known, math.nan))

    def refused(self, error: type[Exception], key: int, call: Callable[[], Any]) -> None:
        before = self._looks(key)
        try:
            call()
        except error:
            assert self._looks(key) == before, "a refused call changed something"
            self.refusals += 1
        else:
            raise AssertionError(f"a call for block {key} was not refused")

    def compare(self) -> None:
        self.table.check()
        assert list(self.table) == list(self.model.entries)
        assert self.table.used_bytes == self.model.used
        assert self.table.free_bytes + self.table.used_bytes == self.table.total_bytes
        assert self.table.largest_hole_bytes == self.model.largest_hole()
        assert self.table.peak_bytes == self.model.peak
        for key, e in self.model.entries.items():
            assert _facts(self.table.slot(key)) == (e.offset, e.size, e.evictable, e.next_use)
        self.table.reset_peak()
        self.model.peak = self.model.used

    def _looks(self, key: int) -> tuple[Any, ...]:
        table = self.table
        slot = _facts(table.slot(key)) if key in table else None
        return len(table), table.used_bytes, table.peak_bytes, table.largest_hole_bytes, slot

    def _num_bytes(self) -> int:
        if self.random.random() < 0.2:
            return self.random.choice((0, 1, 4096, 4097, NUM_BLOCKS * PAGE_BYTES + 1))
        return self.random.randint(1, 60_000)

    def _next_use(self) -> float | None:
        return self.random.choice((None, self.random.randrange(6), self.random.random() * 6))


def _facts(slot: Slot) -> tuple[Any, ...]:
    return slot.offset_bytes, slot.num_bytes, slot.evictable, slot.next_use


def walk(num_operations: int, seed: int, ledger: type[Ledger] = Ledger) -> Walk:
    run = Walk(seed, ledger)
    for operation in range(num_operations):
        run.step()
        if operation % 500 == 0:
            run.compare()
    run.compare()
    return run


def test_30_000_random_operations() -> None:
    run = walk(30_000, seed=1)
    assert run.evicted > 500
    assert run.refusals > 500


@pytest.mark.soak
def test_1_000_000_random_operations() -> None:
    run = walk(1_000_000, seed=2)
    assert run.evicted > 20_000
    assert run.refusals > 20_000


class Reordered(Ledger):
    """Names victims from another list than the one it keeps."""

    def others(self) -> list[tuple[float, int, Hashable]]:
        return self._evictable

    def victims(self, num_bytes: int) -> list[Hashable] | None:
        kept, self._evictable = self._evictable, self.others()
        try:
            return super().victims(num_bytes)
        finally:
            self._evictable = kept


class NearestGoesFirst(Reordered):
    def others(self) -> list[tuple[float, int, Hashable]]:
        return self._evictable[::-1]


class YoungestGoesFirst(Reordered):
    def others(self) -> list[tuple[float, int, Hashable]]:
        return sorted(self._evictable, key=lambda entry: (entry[0], -entry[1]))


class WithdrawnIsAVictim(Ledger):
    def withdraw(self, key: Hashable) -> None:
        self.slot(key)


class NobodyIsSpared(Ledger):
    def _needed(self, tried: list[Hashable], start: int, end: int, size: int) -> list[Hashable]:
        return tried


class VictimsAreFreed(Ledger):
    def victims(self, num_bytes: int) -> list[Hashable] | None:
        found = super().victims(num_bytes)
        for key in found or []:
            self.free(key)
        return found


class NextUseIsIgnored(Ledger):
    def set_next_use(self, key: Hashable, next_use: float | None) -> None:
        super().set_next_use(key, next_use)
        super().set_next_use(key, None)


class HolesStayApart(Ledger):
    def _release(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._used_bytes -= slot.num_bytes
        if slot.num_bytes:
            self._add_hole(slot.offset_bytes, slot.num_bytes)


class OfferedTwiceIsListedTwice(Ledger):
    def offer(self, key: Hashable) -> None:
        slot = self.slot(key)
        slot.evictable = True
        self._list(key, slot)


class FreedSlotIsLost(Ledger):
    def free(self, key: Hashable) -> None:
        self.withdraw(key)
        del self._slots[key]


class LargestHoleIsTaken(Ledger):
    def _take(self, key: Hashable, num_bytes: int, size: int) -> int:
        hidden, self._holes = self._holes, self._holes[-1:]
        place = super()._take(key, num_bytes, size)
        for hole in hidden[:-1]:
            insort(self._holes, hole)
        return place


class FullIsCounted(Ledger):
    def _take(self, key: Hashable, num_bytes: int, size: int) -> int:
        self._peak_bytes = max(self._peak_bytes, self._used_bytes + size)
        return super()._take(key, num_bytes, size)


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (NearestGoesFirst, "the victims are others"),
        (YoungestGoesFirst, "the victims are others"),
        (WithdrawnIsAVictim, "the victims are others"),
        (NobodyIsSpared, "the victims are others"),
        (VictimsAreFreed, None),
        (NextUseIsIgnored, None),
        (HolesStayApart, None),
        (OfferedTwiceIsListedTwice, None),
        (FreedSlotIsLost, None),
        (LargestHoleIsTaken, "not where it fits best"),
        (FullIsCounted, "a refused call changed something"),
    ],
)
def test_a_broken_table_is_found(broken: type[Ledger], found: str | None) -> None:
    with pytest.raises((AssertionError, KeyError, TierFull), match=found):
        walk(5_000, seed=3, ledger=broken)
