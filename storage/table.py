"""The table of a stack's blobs, and what happens to a row when a transfer begins, ends or fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import torch

from headrace.storage.blockio.thread_pool import Job
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.states import BlobState, Verb, after
from headrace.storage.form import Form
from headrace.storage.open_tier import OpenTier, SlotKey
from headrace.storage.tier import Blob, Move
from headrace.storage.transfer import Fence

NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass
class Transfer:
    """One transfer of a blob: the threads' job and the tier's view of it.

    Args:
        tensor: the source until complete_store, the target until complete_load.
        is_given: the target is the caller's buffer.
        over: the job has finished; no thread uses the slot.
        read: for a store, the last copy out of the source into a given buffer.
    """

    job: Job
    move: Move
    tensor: torch.Tensor | None
    is_given: bool = False
    over: bool = False
    read: Fence | None = None

    def let_go(self) -> torch.Tensor:
        """The tensor; nothing here keeps its memory any more. No thread and no tier touches it."""
        tensor, self.tensor = self.tensor, None
        self.move.data = NOTHING
        assert tensor is not None, "a transfer gives its tensor back once"
        return tensor

    @property
    def whole(self) -> bool:
        """Whether all bytes arrived."""
        return self.over and self.job.error is None


class Forward(NamedTuple):
    """A load that the source answers: the given buffer, and what must be over before the buffer is written."""

    into: torch.Tensor | None
    ready: Fence | None


@dataclass
class Row:
    """One blob.

    Args:
        version: the source's version counter at prepare_store.
        state: changed by the caller's thread alone, through `turn`.
        forward: the open load that the source answers.
        error: why it is failed.
        replaces: the blob of the same key before it. If this one fails, that one is there again.
        discarded: the row has left the table; the end of the last transfer frees the slot.
        copies: device copies into its slot and out of it, as far as they have not been seen to be over.
    """

    slot_key: SlotKey
    tier: OpenTier
    blob: Blob
    form: Form
    version: int
    replaces: Row | None = None
    state: BlobState = BlobState.absent
    store: Transfer | None = None
    load: Transfer | None = None
    forward: Forward | None = None
    error: BaseException | None = None
    discarded: bool = False
    copies: list[Fence] = field(default_factory=list)

    @property
    def key(self) -> BlobKey:
        """Its name."""
        return self.slot_key.key

    @property
    def idle(self) -> bool:
        """Whether no transfer touches its slot."""
        return (self.store is None or self.store.over) and (self.load is None or self.load.over)

    @property
    def store_error(self) -> BaseException | None:
        """Why its bytes did not arrive; None until that is known."""
        return self.store.job.error if self.store is not None and self.store.over else None

    def turn(self, verb: Verb) -> None:
        """Take the state that the verb leads to. Raises KeyError or RuntimeError if that is not allowed."""
        self.state = after(self.key, self.state, verb)

    def launched(self, move: Move) -> None:
        """Remember the device copy of a transfer that has begun."""
        if move.copied is not None:
            self.copies = [fence for fence in self.copies if not fence.passed] + [move.copied]

    def settle(self) -> None:
        """A transfer has begun or ended: bring the slot up to date. Under the stack's lock.

        The slot is freed, or it may be evicted, or not. A replaced blob goes once this one is whole and its source was
        found unchanged.
        """
        if self.discarded:
            if self.idle:
                self.free_slot()
            return
        assert self.store is not None
        is_whole = self.store.whole
        if is_whole and (self.load is None or self.load.over):
            self.tier.ledger.offer(self.slot_key)
        elif self.load is not None:
            self.tier.ledger.withdraw(self.slot_key)
        if self.replaces is not None and is_whole and self.state in (BlobState.stored, BlobState.loading):
            self.replaces.drop()
            self.replaces = None

    def drop(self) -> None:
        """Give its slot back, now or when the last transfer that touches it has ended. Under the stack's lock."""
        self.discarded = True
        if self.idle:
            self.free_slot()
        else:
            self.tier.ledger.withdraw(self.slot_key)
        if self.replaces is not None:
            self.replaces.drop()
            self.replaces = None

    def free_slot(self) -> None:
        """Give the slot back."""
        self.tier.release(self.slot_key, self.copies)


class Table:
    """The blobs of one stack by their keys. Changed by the caller's thread.

    Args:
        lock: the stack's; guards what the I/O threads change in the rows.
    """

    def __init__(self, lock: Lock) -> None:
        self._rows: dict[BlobKey, Row] = {}
        self._lock = lock

    def __iter__(self) -> Iterator[Row]:
        """All blobs; each is followed by those that it replaces."""
        for row in self._rows.values():
            each: Row | None = row
            while each is not None:
                yield each
                each = each.replaces

    def find(self, key: BlobKey) -> Row | None:
        """The row, if any."""
        return self._rows.get(key)

    def row(self, key: BlobKey, verb: Verb) -> Row:
        """The row for a verb that its state allows.

        Raises:
            KeyError, RuntimeError: see states.after.
            TransferFailed: the verb is a prepare, and the store has failed or, for a load, the blob is failed.
        """
        row = self._rows.get(key)
        if row is not None and row.error is not None and verb is Verb.prepare_load:
            raise failure_of(row, row.error)
        after(key, BlobState.absent if row is None else row.state, verb)
        assert row is not None
        if verb in (Verb.prepare_store, Verb.prepare_load) and row.store_error is not None:
            raise self.fail(row, row.store_error)
        return row

    def put(self, row: Row) -> None:
        """Add a row. If it replaces one, it takes that one's place."""
        self._rows[row.key] = row

    def fail(self, row: Row, error: BaseException) -> TransferFailed:
        """The blob has failed; the one that it replaces, if any, is there again. Returns what to raise."""
        with self._lock:
            row.turn(Verb.fail)
            row.error = error
            if row.replaces is not None:
                row.turn(Verb.fall_back)
                self._rows[row.key], row.replaces = row.replaces, None
                row.drop()
        return failure_of(row, error)

    def drop(self, row: Row) -> None:
        """Forget a blob, and the one that it replaces."""
        with self._lock:
            row.turn(Verb.discard)
            del self._rows[row.key]
            row.drop()

    def clear(self) -> None:
        """Forget all."""
        self._rows.clear()


def stalled(row: Row, error: TransferFailed) -> TransferFailed:
    """A transfer that may never end: the blob stays as it is, and the tier can only be closed."""
    name = row.tier.tier.medium.value
    return TransferFailed(
        f"{row.key}: {name} tier: {error}; see dmesg for its errors, or raise tiers.ssd.timeout_s for a slow one"
    )


def failure_of(row: Row, error: BaseException | None) -> TransferFailed:
    """The error of an I/O thread as the caller's own, so that its traceback shows the verb."""
    text = str(error) if isinstance(error, TransferFailed) else f"{row.key}: {type(error).__name__}: {error}"
    failure = TransferFailed(text)
    failure.__cause__ = error
    return failure
