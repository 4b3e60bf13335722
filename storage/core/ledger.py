"""Who has which bytes of one tier: a table of slots inside one byte range. No torch, no I/O.

Every slot is exact-size, rounded up to the range's alignment and nothing more: a 33 MiB blob takes 33 MiB, not 64.
Holes are kept by size for best fit and by both ends so that neighbours merge the moment a slot is freed. Slots that
may be evicted are kept in the order in which they would be, so that a full tier names its victims without a sort.

The ledger does not know what a blob is doing (states.py): its user says which slots may be evicted.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from headrace.storage.core.errors import TierFull

PAGE_BYTES = 4096
# Where a piece of a blob may begin: a multiple of the size of every dtype.
PIECE_BYTES = 16


@dataclass
class Slot:
    """A range of the tier.

    Args:
        offset_bytes: from the start of the tier's range, a multiple of the alignment.
        num_bytes: a multiple of the alignment; 0 for a blob without bytes.
        evictable: whether it may be named as a victim: its bytes are whole, and nothing touches them.
        next_use: when the plan needs the blob again; None: unknown, taken as later than any other.
        serial: counts the slots of a ledger; a lower one is older.
    """

    offset_bytes: int
    num_bytes: int
    evictable: bool = False
    next_use: float | None = None
    serial: int = 0


def round_up(num_bytes: int, alignment: int = PAGE_BYTES) -> int:
    """The smallest multiple of `alignment` that holds `num_bytes`."""
    return -(-num_bytes // alignment) * alignment


class Ledger:
    """Best-fit slots within `total_bytes`.

    A second slot for a key raises RuntimeError, and an unknown key KeyError: both are mistakes of the caller, not
    conditions of the machine. Not thread-safe.

    Args:
        tier: how messages call the range, for example "host".
        total_bytes: size of the range; the remainder beyond a multiple of `alignment` is not used.
        remedy: end of the TierFull message, for example "raise tiers.host.budget_gib".
        kind_of: the kind of a key, of which peak_bytes_by_kind tells; None: nothing is counted by kind.
    """

    def __init__(
        self,
        tier: str,
        total_bytes: int,
        *,
        remedy: str = "",
        alignment: int = PAGE_BYTES,
        kind_of: Callable[[Hashable], str] | None = None,
    ) -> None:
        self.tier = tier
        self.total_bytes = total_bytes // alignment * alignment
        self._alignment = alignment
        self._remedy = remedy
        self._slots: dict[Hashable, Slot] = {}
        self._used_bytes = 0
        self._peak_bytes = 0
        self._kind_of = kind_of
        self._by_kind: dict[str, tuple[int, int]] = {}  # bytes used, and their peak
        self._holes: list[tuple[int, int]] = []  # (size, offset), sorted
        self._size_by_start: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._evictable: list[tuple[float, int, Hashable]] = []  # (*_rank, key), sorted; offered slots that have bytes
        self._next_serial = 0
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
    def peak_bytes_by_kind(self) -> dict[str, int]:
        """The same of the slots of every kind by itself; their peaks may be at different moments."""
        return {kind: peak for kind, (_, peak) in self._by_kind.items()}

    @property
    def largest_hole_bytes(self) -> int:
        """The largest slot that fits now."""
        return self._holes[-1][0] if self._holes else 0

    def reset_peak(self) -> None:
        """Start new peaks from what is used now."""
        self._peak_bytes = self._used_bytes
        self._by_kind = {kind: (used, used) for kind, (used, _) in self._by_kind.items() if used}

    def slot(self, key: Hashable) -> Slot:
        """The key's slot. Raises KeyError."""
        try:
            return self._slots[key]
        except KeyError:
            raise KeyError(f"{self.tier} tier: no blob {key}") from None

    def __iter__(self) -> Iterator[Hashable]:
        """All keys with a slot, oldest first."""
        return iter(list(self._slots))

    def prepare(self, key: Hashable, num_bytes: int, *, next_use: float | None = None) -> Slot:
        """Reserve a slot for bytes that are on their way.

        Args:
            num_bytes: rounded up to a multiple of the alignment.
            next_use: see set_next_use.

        Raises:
            TierFull: no hole is large enough; nothing changed.
            RuntimeError: the key has a slot already.
            ValueError: num_bytes is negative, or next_use is not a number.
        """
        self._check_new(key, num_bytes)
        self._check_next_use(key, next_use)
        size = round_up(num_bytes, self._alignment)
        return self._add(key, self._take(key, num_bytes, size) if size else 0, size, next_use)

    def prepare_at(self, key: Hashable, offset_bytes: int, num_bytes: int) -> Slot:
        """As prepare, for bytes that are there already; nothing else knows of them yet.

        Raises:
            RuntimeError: as prepare. ValueError: as prepare, or the slot is not free, or not in the range.
        """
        self._check_new(key, num_bytes)
        size = round_up(num_bytes, self._alignment)
        if size:
            # The newest hole first: where slots are prepared in the order of their offsets it is the right one.
            holes = reversed(self._size_by_start.items())
            start, length = next((it for it in holes if it[0] <= offset_bytes < sum(it)), (0, 0))
            behind = start + length - offset_bytes - size
            if not length or behind < 0 or offset_bytes % self._alignment:
                raise ValueError(f"{self.tier} tier: blob {key}: {size} bytes at {offset_bytes} are no free slot")
            self._remove_hole(start)
            for begin, left in ((start, offset_bytes - start), (offset_bytes + size, behind)):
                if left:
                    self._add_hole(begin, left)
        return self._add(key, offset_bytes if size else 0, size, None)

    def _check_new(self, key: Hashable, num_bytes: int) -> None:
        if key in self._slots:
            raise RuntimeError(f"{self.tier} tier: blob {key} was prepared twice")
        if num_bytes < 0:
            raise ValueError(f"{self.tier} tier: blob {key} has {num_bytes} bytes")

    def _add(self, key: Hashable, offset_bytes: int, size: int, next_use: float | None) -> Slot:
        slot = Slot(offset_bytes, size, next_use=next_use, serial=self._next_serial)
        self._next_serial += 1
        self._slots[key] = slot
        self._used_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        self._count(key, size)
        return slot

    def _count(self, key: Hashable, change: int) -> None:
        if self._kind_of is not None:
            used, peak = self._by_kind.get(kind := self._kind_of(key), (0, 0))
            self._by_kind[kind] = used + change, max(peak, used + change)

    def offer(self, key: Hashable) -> None:
        """The slot may be evicted from now on."""
        slot = self.slot(key)
        if not slot.evictable:
            slot.evictable = True
            self._list(key, slot)

    def withdraw(self, key: Hashable) -> None:
        """The slot may not be evicted any more."""
        slot = self.slot(key)
        self._unlist(slot)
        slot.evictable = False

    def free(self, key: Hashable) -> None:
        """Give the slot back; the caller knows that nothing touches it."""
        self._unlist(self.slot(key))
        self._release(key)

    def set_next_use(self, key: Hashable, next_use: float | None) -> None:
        """Say when the plan needs a blob again.

        Args:
            next_use: a number that grows with time, for example the turn of the backward pass that reads the blob;
                None: unknown, taken as later than any number.

        Raises:
            KeyError: the key has no slot.
            ValueError: next_use is not a number.
        """
        self._check_next_use(key, next_use)
        slot = self.slot(key)
        self._unlist(slot)
        slot.next_use = next_use
        self._list(key, slot)

    def victims(self, num_bytes: int) -> list[Hashable] | None:
        """The blobs to evict so that `num_bytes` fit: next-use eviction. Changes nothing.

        Only blobs that were offered are named. Of all sets of such blobs that would make the hole, this
        is the one that spares the blob needed soonest if any of them does, then the one needed next, and so on; of
        blobs needed at the same time the youngest is spared first. So no blob is named that the hole can do without.

        Where all blobs and requests are of one size this is the rule of Belady 1966 (A study of replacement
        algorithms for a virtual-storage computer, IBM Systems Journal 5(2)): free the blob whose next use is furthest
        in the future. No other rule has to bring back fewer blobs. For unequal sizes it is a heuristic: one large
        blob that is needed soon may cost less to bring back than several small ones that are needed late, and the
        cheapest choice is NP-hard to find (Chrobak, Woeginger, Makino, Xu 2012, Caching is hard even in the fault
        model, Algorithmica 63).

        Takes blobs, furthest first, until their slots and the holes between make room; each costs a few dictionary
        look-ups. Blobs stored in the order of the forward pass lie beside each other in the order of their next use,
        so that few are tried in vain.

        Returns:
            Keys, furthest next use first; [] where a hole is there already; None where no choice makes one.

        Raises:
            ValueError: num_bytes is negative.
        """
        if num_bytes < 0:
            raise ValueError(f"{self.tier} tier: victims for {num_bytes} bytes")
        size = round_up(num_bytes, self._alignment)
        if size <= self.largest_hole_bytes:
            return []
        if size > self.total_bytes:
            return None
        tried: list[Hashable] = []
        # Runs of holes and tried slots, by both ends. An entry that a longer run swallows is not looked at again: its
        # edge is no longer the edge of a slot that is left.
        start_by_end: dict[int, int] = {}
        end_by_start: dict[int, int] = {}
        for _, _, key in self._evictable:
            tried.append(key)
            slot = self._slots[key]
            start, end = slot.offset_bytes, slot.offset_bytes + slot.num_bytes
            start = start_by_end.get(start, self._start_by_end.get(start, start))
            end = end_by_start.get(end, end + self._size_by_start.get(end, 0))
            start_by_end[end], end_by_start[start] = start, end
            if end - start >= size:
                return self._needed(tried, start, end, size)
        return None

    def check(self) -> None:
        """Recount everything from the slots. Raises AssertionError where an invariant is broken."""
        ranges = sorted((s.offset_bytes, s.num_bytes) for s in self._slots.values() if s.num_bytes)
        holes = sorted((offset, size) for size, offset in self._holes)
        cursor, previous_was_hole = 0, False
        for start, size, is_hole in sorted([(*r, False) for r in ranges] + [(*h, True) for h in holes]):
            assert start == cursor, f"bytes {cursor} to {start} belong to no slot or to two slots"
            assert size > 0
            assert size % self._alignment == 0
            assert not (is_hole and previous_was_hole), f"two holes meet at {start} and are not one"
            cursor, previous_was_hole = start + size, is_hole
        assert cursor == self.total_bytes
        assert sum(size for _, size in ranges) == self._used_bytes
        assert self._holes == sorted(self._holes)
        assert dict(holes) == self._size_by_start
        assert {o + s: o for o, s in holes} == self._start_by_end
        evictable = [(*_rank(s), k) for k, s in self._slots.items() if s.evictable and s.num_bytes]
        assert self._evictable == sorted(evictable), "the order of eviction is not that of next use"

    def _check_next_use(self, key: Hashable, next_use: float | None) -> None:
        if next_use is not None and math.isnan(next_use):
            raise ValueError(f"{self.tier} tier: the next use of blob {key} is {next_use}; give a number or None")

    def _list(self, key: Hashable, slot: Slot) -> None:
        if slot.evictable and slot.num_bytes:
            insort(self._evictable, (*_rank(slot), key))

    def _unlist(self, slot: Slot) -> None:
        if slot.evictable and slot.num_bytes:
            del self._evictable[bisect_left(self._evictable, _rank(slot))]

    def _needed(self, tried: list[Hashable], start: int, end: int, size: int) -> list[Hashable]:
        """The tried blobs without which [start, end) would have no hole of `size`; nearest next use spared first.

        The last one tried is needed: before it there was no hole. So is what keeps the part around it long enough.
        """
        last = self._slots[tried[-1]]
        needed = [tried[-1]]
        for key in reversed(tried[:-1]):
            slot = self._slots[key]
            slot_end = slot.offset_bytes + slot.num_bytes
            if slot_end <= start or slot.offset_bytes >= end:
                continue
            if slot.offset_bytes < last.offset_bytes and end - slot_end >= size:
                start = slot_end
            elif slot.offset_bytes > last.offset_bytes and slot.offset_bytes - start >= size:
                end = slot.offset_bytes
            else:
                needed.append(key)
        return needed[::-1]

    def _take(self, key: Hashable, num_bytes: int, size: int) -> int:
        best = bisect_left(self._holes, (size, 0))
        if best == len(self._holes):
            remedy = f"; {self._remedy}" if self._remedy else ""
            raise TierFull(
                f"{self.tier} tier is full: blob {key} needs {num_bytes} bytes, {self.free_bytes} of "
                f"{self.total_bytes} bytes are free, the largest hole has {self.largest_hole_bytes}{remedy}"
            )
        hole_size, hole = self._holes[best]
        self._remove_hole(hole)
        if size < hole_size:
            self._add_hole(hole + size, hole_size - size)
        return hole

    def _release(self, key: Hashable) -> None:
        slot = self._slots.pop(key)
        self._used_bytes -= slot.num_bytes
        self._count(key, -slot.num_bytes)
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


def _rank(slot: Slot) -> tuple[float, int]:
    """Place in the order of eviction: furthest next use first, then oldest."""
    return -math.inf if slot.next_use is None else -slot.next_use, slot.serial
