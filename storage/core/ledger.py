"""Who has which bytes of one tier: a table of slots inside one byte range. No torch, no I/O.

Every slot is exact-size, rounded up to the range's alignment and nothing more: a 33 MiB blob takes 33 MiB, not 64.
Holes are kept by size for best fit and by both ends so that neighbours merge the moment a slot is freed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from enum import Enum

from headrace.storage.core.errors import TierFull

BLOCK_BYTES = 4096


class SlotState(Enum):
    """Where a slot stands. A slot that is `stored` and pinned is `loading`."""

    preparing = "preparing"
    stored = "stored"
    loading = "loading"


@dataclass
class Slot:
    """A range of the tier.

    Args:
        offset_bytes: from the start of the tier's range, a multiple of the alignment.
        num_bytes: a multiple of the alignment; 0 for a blob without bytes.
        pins: loads under way; a pinned slot is never freed.
    """

    offset_bytes: int
    num_bytes: int
    state: SlotState = SlotState.preparing
    pins: int = 0


def round_up(num_bytes: int, alignment: int = BLOCK_BYTES) -> int:
    """The smallest multiple of `alignment` that holds `num_bytes`."""
    return -(-num_bytes // alignment) * alignment


class Ledger:
    """Best-fit slots within `total_bytes`, with the life of a block enforced.

    prepare -> complete -> (pin -> unpin)* -> free, or prepare -> abandon. Anything else raises RuntimeError, and an
    unknown key KeyError: both are mistakes of the caller, not conditions of the machine. Not thread-safe.

    Args:
        tier: how messages call the range, for example "host".
        total_bytes: size of the range; the remainder beyond a multiple of `alignment` is not used.
        remedy: end of the TierFull message, for example "raise tiers.host.budget_gib".
    """

    def __init__(self, tier: str, total_bytes: int, *, remedy: str = "", alignment: int = BLOCK_BYTES) -> None:
        self.tier = tier
        self.total_bytes = total_bytes // alignment * alignment
        self._alignment = alignment
        self._remedy = remedy
        self._slots: dict[Hashable, Slot] = {}
        self._used_bytes = 0
        self._peak_bytes = 0
        self._holes: list[tuple[int, int]] = []  # (size, offset), sorted
        self._size_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        if self.total_bytes:
            self._add_hole(0, self.total_bytes)

    def __contains__(self, key: Hashable) -> bool:
        """Whether the key has a slot, in any state."""
        return key in self._slots

    def __len__(self) -> int:
        """Number of slots."""
        return len(self._slots)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of all holes."""
        return self.total_bytes - self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest used_bytes since creation or reset_peak."""
        return self._peak_bytes

    @property
    def largest_hole_bytes(self) -> int:
        """The largest slot that fits now."""
        return self._holes[-1][0] if self._holes else 0

    def reset_peak(self) -> None:
        """Start a new peak from what is used now."""
        self._peak_bytes = self._used_bytes

    def slot(self, key: Hashable) -> Slot:
        """The key's slot. Raises KeyError."""
        try:
            return self._slots[key]
        except KeyError:
            raise KeyError(f"{self.tier} tier: no block {key}") from None

    def __iter__(self) -> Iterator[Hashable]:
        """All keys with a slot, oldest first."""
        return iter(list(self._slots))

    def prepare(self, key: Hashable, num_bytes: int) -> Slot:
        """Reserve a slot for bytes that are on their way.

        Raises:
            TierFull: no hole is large enough; nothing changed.
            RuntimeError: the key has a slot already.
        """
        if key in self._slots:
            raise RuntimeError(f"{self.tier} tier: block {key} was prepared twice")
        if num_bytes < 0:
            raise ValueError(f"{self.tier} tier: block {key} has {num_bytes} bytes")
        size = round_up(num_bytes, self._alignment)
        slot = Slot(self._take(key, num_bytes, size) if size else 0, size)
        self._slots[key] = slot
        self._used_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        return slot

    def complete(self, key: Hashable) -> None:
        """The bytes are whole. Exactly once per prepare."""
        slot = self._in_state(key, SlotState.preparing, "completed")
        slot.state = SlotState.stored

    def abandon(self, key: Hashable) -> None:
        """The bytes did not arrive: give the slot back."""
        self._in_state(key, SlotState.preparing, "abandoned")
        self._release(key)

    def pin(self, key: Hashable) -> None:
        """A load starts: the slot stays until unpinned as often."""
        slot = self.slot(key)
        if slot.state is SlotState.preparing:
            raise RuntimeError(f"{self.tier} tier: block {key} is pinned before its bytes are whole")
        slot.pins += 1
        slot.state = SlotState.loading

    def unpin(self, key: Hashable) -> None:
        """A load ended."""
        slot = self._in_state(key, SlotState.loading, "unpinned")
        slot.pins -= 1
        if slot.pins == 0:
            slot.state = SlotState.stored

    def free(self, key: Hashable) -> None:
        """Give a whole, unpinned slot back."""
        self._in_state(key, SlotState.stored, "freed")
        self._release(key)

    def check(self) -> None:
        """Recount everything from the slots. Raises AssertionError where an invariant is broken."""
        ranges = sorted((s.offset_bytes, s.num_bytes) for s in self._slots.values() if s.num_bytes)
        holes = sorted((offset, size) for size, offset in self._holes)
        cursor, previous_was_hole = 0, False
        for start, size, is_hole in sorted([(*r, False) for r in ranges] + [(*h, True) for h in holes]):
            assert start == cursor, f"bytes {cursor} to {start} belong to nobody or to two"
            assert size > 0
            assert size % self._alignment == 0
            assert not (is_hole and previous_was_hole), f"two holes meet at {start} and are not one"
            cursor, previous_was_hole = start + size, is_hole
        assert cursor == self.total_bytes
        assert sum(size for _, size in ranges) == self._used_bytes
        assert self._holes == sorted(self._holes)
        assert dict(holes) == self._size_by_start
        assert {o + s: o for o, s in holes} == self._start_by_end
        assert all((s.pins > 0) == (s.state is SlotState.loading) for s in self._slots.values())

    def _in_state(self, key: Hashable, wanted: SlotState, done: str) -> Slot:
        slot = self.slot(key)
        if slot.state is not wanted:
            raise RuntimeError(f"{self.tier} tier: block {key} cannot be {done} while it is {slot.state.value}")
        return slot

    def _take(self, key: Hashable, num_bytes: int, size: int) -> int:
        best = bisect_left(self._holes, (size, 0))
        if best == len(self._holes):
            remedy = f"; {self._remedy}" if self._remedy else ""
            raise TierFull(
                f"{self.tier} tier is full: block {key} wants {num_bytes} bytes, {self.free_bytes} of "
                f"{self.total_bytes} bytes are free, the largest hole has {self.largest_hole_bytes}{remedy}"
            )
        hole_size, offset = self._holes[best]
        self._remove_hole(offset)
        if hole_size > size:
            self._add_hole(offset + size, hole_size - size)
        return offset

    def _release(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._used_bytes -= slot.num_bytes
        if not slot.num_bytes:
            return
        start, end = slot.offset_bytes, slot.offset_bytes + slot.num_bytes
        if end in self._size_by_start:
            end += self._remove_hole(end)
        if start in self._start_by_end:
            before = self._start_by_end[start]
            self._remove_hole(before)
            start = before
        self._add_hole(start, end - start)

    def _add_hole(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._size_by_start[start] = size
        self._start_by_end[start + size] = start

    def _remove_hole(self, start: int) -> int:
        size = self._size_by_start.pop(start)
        del self._start_by_end[start + size]
        del self._holes[bisect_left(self._holes, (size, start))]
        return size
