"""The slot table by hand: every byte has one owner, every key one slot, and who goes when it is full."""

from __future__ import annotations

import pytest

from headrace.storage.core.errors import TierFull
from headrace.storage.core.ledger import PAGE_BYTES, Ledger


def ledger(blocks: int = 8) -> Ledger:
    return Ledger("host", blocks * PAGE_BYTES, remedy="raise tiers.host.budget_gib")


def stored(table: Ledger, key: str, num_bytes: int) -> int:
    offset = table.prepare(key, num_bytes).offset_bytes
    table.offer(key)
    return offset


def test_slots_are_exact_and_aligned() -> None:
    table = ledger()
    assert stored(table, "a", 1) == 0
    assert stored(table, "b", 3 * PAGE_BYTES) == PAGE_BYTES
    assert (table.used_bytes, table.free_bytes) == (4 * PAGE_BYTES, 4 * PAGE_BYTES)
    assert table.slot("b").num_bytes == 3 * PAGE_BYTES


def test_a_tail_smaller_than_a_block_is_not_used() -> None:
    assert Ledger("host", 2 * PAGE_BYTES + 100).total_bytes == 2 * PAGE_BYTES


def test_a_blob_without_bytes_takes_none() -> None:
    table = ledger(0)
    stored(table, "a", 0)
    assert (table.used_bytes, table.largest_hole_bytes) == (0, 0)
    table.free("a")
    table.check()


def test_best_fit_leaves_the_large_hole_whole() -> None:
    table = ledger(8)
    for key, blocks in (("a", 2), ("b", 1), ("c", 1), ("d", 1)):
        stored(table, key, blocks * PAGE_BYTES)
    table.free("a")
    table.free("c")  # holes now: a's 2 blocks, c's 1, the 3 at the end
    assert stored(table, "e", PAGE_BYTES) == 3 * PAGE_BYTES
    assert table.largest_hole_bytes == 3 * PAGE_BYTES


def test_freed_neighbours_become_one_hole() -> None:
    table = ledger(4)
    for key in "abcd":
        stored(table, key, PAGE_BYTES)
    for key in "bdac":
        table.free(key)
        table.check()
    assert table.largest_hole_bytes == 4 * PAGE_BYTES


def test_full_names_tier_wanted_free_and_largest_hole() -> None:
    table = ledger(4)
    for key in "abcd":
        stored(table, key, PAGE_BYTES)
    table.free("a")
    table.free("c")
    with pytest.raises(TierFull) as caught:
        table.prepare("e", 5000)
    for part in ("host tier", "e needs 5000 bytes", "8192 of 16384", "largest hole has 4096", "tiers.host.budget_gib"):
        assert part in str(caught.value)
    assert "e" not in table
    table.check()


def test_a_key_has_one_slot() -> None:
    table = ledger()
    table.prepare("a", 1)
    with pytest.raises(RuntimeError, match="blob a was prepared twice"):
        table.prepare("a", 1)
    table.free("a")
    for unknown in (table.free, table.offer, table.withdraw, table.slot):
        with pytest.raises(KeyError, match="no blob a"):
            unknown("a")
    with pytest.raises(ValueError, match="-1 bytes"):
        table.prepare("b", -1)
    assert table.used_bytes == 0


def test_the_peak_is_kept_until_reset() -> None:
    table = ledger()
    stored(table, "a", 3 * PAGE_BYTES)
    table.free("a")
    assert table.peak_bytes == 3 * PAGE_BYTES
    table.reset_peak()
    assert table.peak_bytes == 0


def test_every_kind_has_a_peak_of_its_own() -> None:
    table = Ledger("host", 8 * PAGE_BYTES, kind_of=lambda key: str(key)[0])
    stored(table, "x0", PAGE_BYTES)
    stored(table, "x1", PAGE_BYTES)
    table.free("x0")
    stored(table, "v0", 3 * PAGE_BYTES)
    assert table.peak_bytes_by_kind == {"x": 2 * PAGE_BYTES, "v": 3 * PAGE_BYTES}
    table.free("x1")
    table.reset_peak()
    assert table.peak_bytes_by_kind == {"v": 3 * PAGE_BYTES}


def test_the_block_needed_last_is_the_victim() -> None:
    table = ledger(4)
    for key, turn in (("a", 3), ("b", 7.5), ("c", 1), ("d", 7)):
        table.prepare(key, 1, next_use=turn)
        table.offer(key)
    assert table.victims(1) == ["b"]
    table.set_next_use("d", 8)
    assert table.victims(1) == ["d"]
    table.set_next_use("c", None)  # unknown: later than any number
    assert table.victims(1) == ["c"]
    assert table.victims(PAGE_BYTES + 1) == ["c", "d"]
    assert table.victims(5 * PAGE_BYTES) is None
    table.free("a")
    assert table.victims(1) == []
    table.check()


def test_of_blocks_needed_at_the_same_time_the_oldest_goes() -> None:
    table = ledger(3)
    for key in "bac":
        stored(table, key, 1)
    assert table.victims(1) == ["b"]
    table.withdraw("b")
    assert table.victims(1) == ["a"]
    table.offer("b")
    assert table.victims(1) == ["b"], "a load does not make a block younger"


def test_blocks_that_do_not_touch_the_hole_are_spared() -> None:
    table = ledger(6)
    for key, turn in (("a", 9), ("b", 1), ("c", 8), ("d", 7), ("e", 6), ("f", 2)):
        table.prepare(key, PAGE_BYTES, next_use=turn)
        table.offer(key)
    assert table.victims(2 * PAGE_BYTES) == ["c", "d"]
    assert table.victims(3 * PAGE_BYTES) == ["c", "d", "e"]
    table.free("e")
    assert table.victims(2 * PAGE_BYTES) == ["d"], "what was needed for the hole only until the last came is spared"


def test_what_was_not_offered_is_no_victim() -> None:
    table = ledger(3)
    table.prepare("preparing", 1)
    for key in ("loading", "stored"):
        stored(table, key, 1)
    table.withdraw("loading")
    table.set_next_use("stored", 0)
    assert table.victims(1) == ["stored"]
    table.withdraw("stored")
    assert table.victims(1) is None
    table.prepare("empty", 0)
    table.offer("empty")
    assert table.victims(0) == []
    assert table.victims(1) is None, "a blob without bytes makes no room"


def test_a_next_use_is_a_number_of_a_block_that_is_there() -> None:
    table = ledger()
    with pytest.raises(ValueError, match="blob a is nan"):
        table.prepare("a", 1, next_use=float("nan"))
    assert "a" not in table
    with pytest.raises(KeyError, match="no blob a"):
        table.set_next_use("a", 1)
    table.prepare("a", 1, next_use=2)
    with pytest.raises(ValueError, match="blob a is nan"):
        table.set_next_use("a", float("nan"))
    assert table.slot("a").next_use == 2
    with pytest.raises(ValueError, match="-1 bytes"):
        table.victims(-1)
