"""The rows of the stack's block table, and what the stack keeps per tier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from headrace.storage.blockio.thread_pool import IoThreads, Job
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.ledger import Ledger, Slot, SlotState
from headrace.storage.core.records import Direction, TierStats
from headrace.storage.tier import Blob, Move, Tier
from headrace.storage.transfer import Fence


class BlockState(StrEnum):
    """The state of a block of the stack."""

    preparing = "preparing"  # its bytes are on their way in; the source still serves loads
    stored = "stored"  # whole in its tier
    loading = "loading"  # on its way back, its slot pinned
    failed = "failed"  # a transfer went wrong: only discard is left


class SlotKey(NamedTuple):
    """A key may be stored again while the slot of its discarded namesake is still being written."""

    key: BlockKey
    serial: int

    def __str__(self) -> str:
        return str(self.key)


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
        self.ledger = Ledger(name, tier.capacity_bytes, remedy=f"raise tiers.{name}.budget_gib")
        self.moved_bytes = dict.fromkeys(Direction, 0)
        self.busy = {direction: BusyTime() for direction in Direction}
        self.forwarded_blocks = self.evicted_blocks = 0
        self._fences: list[tuple[Slot, Fence]] = []

    def release(self, key: SlotKey, fences: Iterable[Fence]) -> None:
        """Give a slot back, whatever became of its bytes. Device copies that may still touch it are remembered."""
        slot = self.ledger.slot(key)
        self._fences = [(it, fence) for it, fence in self._fences if not fence.passed]
        self._fences += [(slot, fence) for fence in fences if not fence.passed]
        if slot.state is SlotState.preparing:
            self.ledger.abandon(key)
        else:
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
            "stored_bytes": found.stored_bytes,
            "loaded_bytes": found.loaded_bytes,
            "store_busy_s": found.store_busy_s,
            "load_busy_s": found.load_busy_s,
            "forwarded_blocks": self.forwarded_blocks,
            "evicted_blocks": self.evicted_blocks,
        }


@dataclass
class Transfer:
    """One way of a block: the threads' job and the tier's view of it.

    Args:
        tensor: the source until complete_store, the target until complete_load.
        over: the job has finished; no thread uses the slot.
    """

    job: Job
    move: Move
    tensor: torch.Tensor | None
    over: bool = False

    def let_go(self) -> torch.Tensor | None:
        """The tensor; nothing here keeps its memory any more. No thread and no tier touches it."""
        tensor, self.tensor = self.tensor, None
        self.move.data = self.move.data.new_empty(0)
        return tensor


@dataclass
class Block:
    """One row.

    Args:
        version: the source's version counter at prepare_store.
        store_open: complete_store is still to come.
        forwarded: the source, where it is the answer to a load.
        discarded: the key has left the table; the end of the last transfer frees the slot.
        copies: device copies into its slot and out of it, as far as they have not been seen to be over.
    """

    slot_key: SlotKey
    tier: OpenTier
    blob: Blob
    shape: torch.Size
    dtype: torch.dtype
    version: int
    state: BlockState = BlockState.preparing
    store: Transfer | None = None
    load: Transfer | None = None
    store_open: bool = True
    forwarded: torch.Tensor | None = None
    discarded: bool = False
    copies: list[Fence] = field(default_factory=list)

    @property
    def key(self) -> BlockKey:
        """Its name."""
        return self.slot_key.key

    @property
    def idle(self) -> bool:
        """Whether no transfer touches its slot."""
        return all(transfer is None or transfer.over for transfer in (self.store, self.load))

    def pin(self) -> None:
        """Its bytes are whole and a load of them runs."""
        self.tier.ledger.pin(self.slot_key)
        self.state = BlockState.loading

    def unpin(self) -> None:
        """The load has ended. Nothing to do where the store failed before the load could pin."""
        if self.tier.ledger.slot(self.slot_key).state is SlotState.loading:
            self.tier.ledger.unpin(self.slot_key)

    def launched(self, move: Move) -> None:
        """Remember the device copy of a transfer that has begun."""
        if move.copied is not None:
            self.copies = [fence for fence in self.copies if not fence.passed] + [move.copied]

    def free_slot(self) -> None:
        """Give the slot back."""
        self.tier.release(self.slot_key, self.copies)


def stalled(block: Block, error: TransferFailed) -> TransferFailed:
    """A transfer that may never end: the block stays as it is, and the tier can only be closed."""
    name = block.tier.tier.medium.value
    return TransferFailed(
        f"{block.key}: {name} tier: {error}; see dmesg for its errors, or raise tiers.ssd.timeout_s for a slow one"
    )


def failure_of(block: Block, error: BaseException | None) -> TransferFailed:
    """The error of an I/O thread as the caller's own, so that its traceback shows the verb."""
    text = str(error) if isinstance(error, TransferFailed) else f"{block.key}: {type(error).__name__}: {error}"
    failure = TransferFailed(text)
    failure.__cause__ = error
    return failure
