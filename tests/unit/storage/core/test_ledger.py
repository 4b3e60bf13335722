"""The slot table against a dictionary: every byte has one owner, every block one life."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from headrace.storage.core.errors import TierFull
from headrace.storage.core.ledger import BLOCK_BYTES, Ledger, SlotState, round_up


def ledger(blocks: int = 8) -> Ledger:
    return Ledger("host", blocks * BLOCK_BYTES, remedy="raise tiers.host.budget_gib")


def stored(table: Ledger, key: str, num_bytes: int) -> int:
    offset = table.prepare(key, num_bytes).offset_bytes
    table.complete(key)
    return offset


def test_slots_are_exact_and_aligned() -> None:
    table = ledger()
    assert stored(table, "a", 1) == 0
    assert stored(table, "b", 3 * BLOCK_BYTES) == BLOCK_BYTES
    assert (table.used_bytes, table.free_bytes) == (4 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    assert table.slot("b").num_bytes == 3 * BLOCK_BYTES


def test_a_tail_smaller_than_a_block_is_not_used() -> None:
    assert Ledger("host", 2 * BLOCK_BYTES + 100).total_bytes == 2 * BLOCK_BYTES


def test_a_blob_without_bytes_takes_none() -> None:
    table = ledger(0)
    stored(table, "a", 0)
    assert (table.used_bytes, table.largest_hole_bytes) == (0, 0)
    table.free("a")
    table.check()


def test_best_fit_leaves_the_large_hole_whole() -> None:
    table = ledger(8)
    for key, blocks in (("a", 2), ("b", 1), ("c", 1), ("d", 1)):
        stored(table, key, blocks * BLOCK_BYTES)
    table.free("a")
    table.free("c")  # holes now: a's 2 blocks, c's 1, the 3 at the end
    assert stored(table, "e", BLOCK_BYTES) == 3 * BLOCK_BYTES
    assert table.largest_hole_bytes == 3 * BLOCK_BYTES


def test_freed_neighbours_become_one_hole() -> None:
    table = ledger(4)
    for key in "abcd":
        stored(table, key, BLOCK_BYTES)
    for key in "bdac":
        table.free(key)
        table.check()
    assert table.largest_hole_bytes == 4 * BLOCK_BYTES


def test_full_names_tier_wanted_free_and_largest_hole() -> None:
    table = ledger(4)
    for key in "abcd":
        stored(table, key, BLOCK_BYTES)
    table.free("a")
    table.free("c")
    with pytest.raises(TierFull) as caught:
        table.prepare("e", 5000)
    for part in ("host tier", "e wants 5000 bytes", "8192 of 16384", "largest hole has 4096", "tiers.host.budget_gib"):
        assert part in str(caught.value)
    assert "e" not in table
    table.check()


def test_a_block_has_one_life() -> None:
    table = ledger()
    table.prepare("a", 1)
    for wrong in (table.free, table.pin, table.unpin):
        with pytest.raises(RuntimeError, match="block a"):
            wrong("a")
    with pytest.raises(RuntimeError, match="prepared twice"):
        table.prepare("a", 1)
    table.complete("a")
    for wrong in (table.complete, table.abandon, table.unpin):
        with pytest.raises(RuntimeError, match="while it is stored"):
            wrong("a")
    table.pin("a")
    table.pin("a")
    table.unpin("a")
    with pytest.raises(RuntimeError, match="cannot be freed while it is loading"):
        table.free("a")
    table.unpin("a")
    table.free("a")
    with pytest.raises(KeyError, match="no block a"):
        table.free("a")
    with pytest.raises(ValueError, match="-1 bytes"):
        table.prepare("b", -1)
    assert table.used_bytes == 0


def test_the_peak_is_kept_until_reset() -> None:
    table = ledger()
    stored(table, "a", 3 * BLOCK_BYTES)
    table.free("a")
    assert table.peak_bytes == 3 * BLOCK_BYTES
    table.reset_peak()
    assert table.peak_bytes == 0


@dataclass
class Entry:
    offset: int
    size: int
    state: SlotState = SlotState.preparing
    pins: int = 0


class Model:
    """The same table, the slow and obvious way: one owner per block of the range."""

    def __init__(self, num_blocks: int) -> None:
        self.owner: list[int | None] = [None] * num_blocks
        self.entries: dict[int, Entry] = {}

    def largest_hole(self) -> int:
        best = run = 0
        for owner in self.owner:
            run = run + 1 if owner is None else 0
            best = max(best, run)
        return best * BLOCK_BYTES

    def take(self, key: int, offset: int, size: int) -> None:
        for block in range(offset // BLOCK_BYTES, (offset + size) // BLOCK_BYTES):
            assert self.owner[block] is None, f"block {block} of {key} belongs to {self.owner[block]}"
            self.owner[block] = key
        self.entries[key] = Entry(offset, size)

    def give_back(self, key: int) -> None:
        entry = self.entries.pop(key)
        for block in range(entry.offset // BLOCK_BYTES, (entry.offset + entry.size) // BLOCK_BYTES):
            self.owner[block] = None


class Walk:
    """Random operations on both; illegal ones too, which must change nothing."""

    def __init__(self, seed: int, num_blocks: int = 96) -> None:
        self.random = random.Random(seed)
        self.table, self.model = ledger(num_blocks), Model(num_blocks)
        self.next_key = 0

    def step(self) -> None:
        verb = self.random.choice(("prepare", "prepare", "complete", "complete", "pin", "unpin", "free", "abandon"))
        if verb == "prepare":
            return self.prepare()
        if not self.model.entries:
            return None
        key = self.random.choice(list(self.model.entries))
        entry = self.model.entries[key]
        legal = {
            "complete": entry.state is SlotState.preparing,
            "abandon": entry.state is SlotState.preparing,
            "pin": entry.state is not SlotState.preparing,
            "unpin": entry.pins > 0,
            "free": entry.state is SlotState.stored,
        }[verb]
        if not legal:
            with pytest.raises(RuntimeError):
                getattr(self.table, verb)(key)
            return None
        getattr(self.table, verb)(key)
        if verb in ("free", "abandon"):
            self.model.give_back(key)
        else:
            entry.pins += {"pin": 1, "unpin": -1}.get(verb, 0)
            entry.state = SlotState.loading if entry.pins else SlotState.stored
        return None

    def prepare(self) -> None:
        key, self.next_key = self.next_key, self.next_key + 1
        num_bytes = (
            self.random.choice((0, 1, 4096, 4097)) if self.random.random() < 0.2 else self.random.randint(1, 60_000)
        )
        size = round_up(num_bytes)
        if size > self.table.largest_hole_bytes:
            assert size > self.model.largest_hole(), "the ledger says full and there is room"
            with pytest.raises(TierFull):
                self.table.prepare(key, num_bytes)
            return
        slot = self.table.prepare(key, num_bytes)
        assert slot.num_bytes == size
        self.model.take(key, slot.offset_bytes, size)

    def compare(self) -> None:
        self.table.check()
        assert set(self.table) == set(self.model.entries)
        assert self.table.used_bytes == sum(e.size for e in self.model.entries.values())
        assert self.table.free_bytes + self.table.used_bytes == self.table.total_bytes
        assert self.table.largest_hole_bytes == self.model.largest_hole()
        for key, entry in self.model.entries.items():
            slot = self.table.slot(key)
            assert (slot.offset_bytes, slot.num_bytes, slot.state, slot.pins) == (
                entry.offset, entry.size, entry.state, entry.pins,
            )  # fmt: skip


def walk(num_operations: int, seed: int) -> None:
    run = Walk(seed)
    for operation in range(num_operations):
        run.step()
        if operation % 500 == 0:
            run.compare()
    run.compare()


def test_200_000_random_operations() -> None:
    walk(200_000, seed=1)


@pytest.mark.soak
def test_1_000_000_random_operations() -> None:
    walk(1_000_000, seed=2)
