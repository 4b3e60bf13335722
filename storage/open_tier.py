"""An open tier: its threads, its table of slots and its counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from headrace.storage.blockio.thread_pool import IoThreads
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.ledger import Ledger, Slot
from headrace.storage.core.records import Direction, TierStats
from headrace.storage.tier import Tier
from headrace.storage.transfer import Fence


class SlotKey(NamedTuple):
    """A key may be stored again while the slot of its discarded namesake is still being written."""

    key: BlobKey
    serial: int

    def __str__(self) -> str:
        return str(self.key)


def _tensor_of(slot_key: Hashable) -> str:
    assert isinstance(slot_key, SlotKey)
    return slot_key.key.name


class BusyTime:
    """Wall time covered by transfers of one direction. They are added as they end."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._covered_until_s = 0.0

    def add(self, start_s: float, end_s: float) -> None:
        """Add a transfer; what overlaps with earlier ones counts once."""
        self.seconds += max(0.0, end_s - max(start_s, self._covered_until_s))
        self._covered_until_s = max(self._covered_until_s, end_s)


class OpenTier:
    """A tier with its table of slots and its counters. The stack's lock guards it.

    Args:
        tier: moves the bytes.
        threads: run its parts. A pool of its own: a slow drive must not hold up copies to host memory.
    """

    def __init__(self, tier: Tier, threads: IoThreads) -> None:
        self.tier = tier
        self.threads = threads
        name = tier.medium.value
        remedy = f"raise tiers.{name}.budget_gib"
        self.ledger = Ledger(name, tier.capacity_bytes, remedy=remedy, kind_of=_tensor_of)
        self.moved_bytes = dict.fromkeys(Direction, 0)
        self.busy = {direction: BusyTime() for direction in Direction}
        self.forwarded_blobs = self.forwarded_bytes = self.evicted_blobs = 0
        self._fences: list[tuple[Slot, Fence]] = []
        self._pins: Counter[SlotKey] = Counter()
        self._left: set[SlotKey] = set()  # pinned slots whose blobs are gone

    def release(self, key: SlotKey, fences: Iterable[Fence]) -> None:
        """Give a slot back, a pinned one later. Device copies that may still touch it are remembered."""
        slot = self.ledger.slot(key)
        self._fences = [(it, fence) for it, fence in self._fences if not fence.passed]
        self._fences += [(slot, fence) for fence in fences if not fence.passed]
        if key in self._pins:
            self.ledger.withdraw(key)
            self._left.add(key)
        else:
            self.ledger.free(key)

    def pin(self, key: SlotKey) -> None:
        """Keep a slot, whatever becomes of its blob, until `unpin` has been called as often."""
        self._pins[key] += 1

    def unpin(self, key: SlotKey) -> None:
        """Undo one `pin`."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            if key in self._left:
                self._left.remove(key)
                self.ledger.free(key)

    def fences_in(self, slot: Slot) -> list[Fence]:
        """Device copies that may still touch the range of a new slot, of the blobs that lay there before."""
        begin, end = slot.offset_bytes, slot.offset_bytes + slot.num_bytes
        return [
            fence
            for old, fence in self._fences
            if old.offset_bytes < end and begin < old.offset_bytes + old.num_bytes and not fence.passed
        ]

    def stats(self) -> TierStats:
        """Occupancy and traffic so far."""
        return TierStats(
            medium=self.tier.medium,
            capacity_bytes=self.ledger.total_bytes,
            used_bytes=self.ledger.used_bytes,
            peak_bytes=self.ledger.peak_bytes,
            peak_bytes_by_tensor=self.ledger.peak_bytes_by_kind,
            stored_bytes=self.moved_bytes[Direction.store],
            loaded_bytes=self.moved_bytes[Direction.load],
            store_busy_s=self.busy[Direction.store].seconds,
            load_busy_s=self.busy[Direction.load].seconds,
        )

    def record(self) -> dict[str, Any]:
        """JSON-able: the tier's own facts, peak and traffic."""
        found = self.stats()
        return {
            **self.tier.record(),
            "peak_bytes": found.peak_bytes,
            "peak_bytes_by_tensor": found.peak_bytes_by_tensor,
            "stored_bytes": found.stored_bytes,
            "loaded_bytes": found.loaded_bytes,
            "store_busy_s": found.store_busy_s,
            "load_busy_s": found.load_busy_s,
            "forwarded_blobs": self.forwarded_blobs,
            "forwarded_bytes": self.forwarded_bytes,
            "evicted_blobs": self.evicted_blobs,
        }
