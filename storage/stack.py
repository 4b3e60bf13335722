"""The one class that workers see: six verbs over the tiers of a rank.

    lookup(key)                      the state of a blob
    prepare_store / complete_store   bytes leave the device; until complete_store the stack holds the tensor
    prepare_load / complete_load     bytes come back; complete_load returns the tensor
    discard(key)                     the slot is free for another blob

A `prepare` returns at once, a `complete` waits for what is left to wait for. core/states.py says which verb may follow
which. storage/README.md draws a blob's life.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from headrace.storage.accounts import Accounts
from headrace.storage.blockio.thread_pool import IoThreads, Job, Urgency
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Direction, LookupResult, Medium, TierStats
from headrace.storage.core.states import BlobState, Verb
from headrace.storage.eviction import Room
from headrace.storage.form import Form, storable
from headrace.storage.keeping import Pinned, StoredBlob, adopted
from headrace.storage.open_tier import OpenTier, SlotKey
from headrace.storage.table import Forward, Row, Table, Transfer, failure_of, stalled
from headrace.storage.tier import Blob, Move, Tier, as_bytes
from headrace.storage.transfer import DeviceCopies
from headrace.storage.transfer_log import TransferLog


class TierStack:
    """Stores tensors in tiers and brings them back bit-equal. One caller thread; the stack's own threads move bytes.

    A verb on an unknown key raises KeyError, a verb that the blob's state does not allow RuntimeError, a buffer that
    does not fit ValueError: all are mistakes of the caller. What the machine does wrong is TierFull or TransferFailed.

    Args:
        tiers: at most one per medium; closed with the stack.
        copies: of the device of the caller's tensors.
        threads: move the parts, a pool per medium; closed with the stack.
        log: gets every finished transfer.
        evict: where host memory is full, the blobs needed last spill to the drive; with False that is TierFull.
        facts: joined into `record()`.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        copies: DeviceCopies,
        threads: Mapping[Medium, IoThreads],
        log: TransferLog,
        evict: bool = False,
        facts: dict[str, Any] | None = None,
    ) -> None:
        media = [tier.medium for tier in tiers]
        if len(set(media)) != len(media):
            raise ValueError(f"one tier per medium, not {[medium.value for medium in media]}")
        self._tiers = {tier.medium: OpenTier(tier, threads[tier.medium]) for tier in tiers}
        self._copies = copies
        self._facts = facts or {}
        self._serials = itertools.count()
        self._lock = threading.Lock()
        self._table = Table(self._lock)
        self._accounts = Accounts(log, copies, self._lock)
        drive = self._tiers[Medium.ssd] if evict and {Medium.host, Medium.ssd} <= self._tiers.keys() else None
        self._room = Room(self._table, drive, self._lock, self._accounts, self._wait)
        self._waited_s = 0.0
        self._pid = os.getpid()
        self._closed = False

    @property
    def exposed_s(self) -> float:
        """Seconds that the caller waited so far: in the verbs, and on CUDA its stream for copies."""
        return self._waited_s + self._room.waited_s + self._copies.stalled_s()

    def lookup(self, key: BlobKey) -> LookupResult:
        """Whether the blob is absent, on its way in, or whole. A failed one is a miss: its bytes are not to be had."""
        row = self._table.find(key)
        with self._lock:
            if row is None or row.state is BlobState.failed or row.store_error is not None:
                return LookupResult.miss
            return LookupResult.hit if row.store is not None and row.store.over else LookupResult.pending

    def state(self, key: BlobKey) -> BlobState:
        """The blob's state; absent where there is none."""
        row = self._table.find(key)
        return BlobState.absent if row is None else row.state

    def prepare_store(
        self, key: BlobKey, source: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        """Start to move a tensor into a tier; it must not be changed in place before complete_store.

        If the key is stored already, the blob is replaced: loads give the new bytes from now on, and the old ones keep
        their slot until the new ones are whole. If the new ones fail, the old ones are the blob again.

        Waits only where more bytes are queued than the window of the threads holds, or blobs are evicted (metered as
        exposed).

        Args:
            source: any dtype and shape, on the stack's device; a copy is made where it is not contiguous.
            medium: host or ssd.
            next_use: when the plan needs the blob again, any growing number; None is last. Orders eviction.

        Raises:
            TierFull: the tier is off or has no room; nothing changed.
            TransferFailed: the last store of this key has failed; the blob before it, if any, is there again.
            InputError: a tensor is sparse or lives on another device.
        """
        self._check_open()
        old = self._table.row(key, Verb.prepare_store) if self._table.find(key) else None
        whole = storable(key, source, self._copies.device)
        opened = self._tier(key, medium, whole.nbytes)
        slot_key = SlotKey(key, next(self._serials))
        slot = self._room.reserve(opened, slot_key, whole.nbytes, next_use)
        blob = Blob(str(key), slot.offset_bytes, whole.nbytes)
        row = Row(slot_key, opened, blob, Form(whole.shape, whole.dtype), whole._version, replaces=old)
        row.turn(Verb.prepare_store)
        with self._lock:
            cleared = opened.fences_in(slot)
        move = Move(blob, as_bytes(whole), self._copies.fence(), cleared)
        try:
            opened.tier.begin_store(move)
            row.launched(move)
        except BaseException:
            with self._lock:
                row.free_slot()
            raise
        job = Job(
            lambda part: opened.tier.store_part(move, part),
            opened.tier.num_parts(blob),
            num_bytes=blob.num_bytes,
            on_done=lambda _: self._over(row, transfer, Direction.store),
            helpable=None if move.ready is None else lambda: move.ready is not None and move.ready.passed,
        )
        row.store = transfer = Transfer(job, move, whole)
        self._table.put(row)
        try:
            self._submit(row, job, Urgency.store)
        except TransferFailed as error:
            self._table.fail(row, error)
            if self._table.find(key) is row:
                self._table.drop(row)
            raise

    def complete_store(self, key: BlobKey) -> None:
        """Let go of the source: after this the caller may change or free it. Once per prepare_store.

        Waits for the bytes to be whole in the tier. On CUDA a copy into host memory is not waited for: the caller's
        stream is ordered after it, and should the bytes be damaged there, the load says so.

        Raises:
            TransferFailed: the bytes did not get there, or the source was changed in place meanwhile.
        """
        row = self._row(key, Verb.complete_store)
        store = row.store
        assert store is not None
        error = None
        if store.move.copied is not None and not store.job.done:
            self._copies.order_caller_after(store.move.copied)
        else:
            error = self._wait(row, store)
        self._copies.order_caller_after(store.read)
        source = store.let_go()
        if error is not None:
            raise self._table.fail(row, error)
        self._check_unchanged(row, source)
        row.turn(Verb.complete_store)
        if row.replaces is not None:
            with self._lock:
                row.settle()

    def prepare_load(self, key: BlobKey, *, into: torch.Tensor | None = None) -> None:
        """Start to bring a blob back. Before its complete_store, the source that the stack holds is the answer.

        Args:
            into: a contiguous tensor of the blob's shape and dtype that takes the bytes. The caller must not use it
                until complete_load or discard has returned. None: new memory.

        Raises:
            TransferFailed: its store failed.
            ValueError: the buffer has another shape, dtype or device, or is not contiguous.
        """
        row = self._row(key, Verb.prepare_load)
        if into is not None:
            row.form.check_buffer(key, into, self._copies.device)
            into = into.detach()
        if row.state is BlobState.storing:
            row.forward = Forward(into, None if into is None else self._copies.fence())
            row.turn(Verb.prepare_load)
            return
        target = self._copies.target(*row.form) if into is None else into
        move = Move(row.blob, as_bytes(target), self._copies.fence(), tuple(row.copies))
        row.tier.tier.begin_load(move)
        row.launched(move)
        job = Job(
            lambda part: self._load_part(row, move, part),
            row.tier.tier.num_parts(row.blob),
            num_bytes=row.blob.num_bytes,
            on_done=lambda _: self._over(row, transfer, Direction.load),
        )
        with self._lock:
            row.load = transfer = Transfer(job, move, target, is_given=into is not None)
            row.turn(Verb.prepare_load)
            row.settle()
        self._submit(row, job, Urgency.load)

    def complete_load(self, key: BlobKey) -> torch.Tensor:
        """The blob's tensor, bit-equal to what was stored, on the stack's device. It stays stored until discarded.

        It is the buffer if one was given. Without a buffer it is the source itself where that was the answer.

        Raises:
            TransferFailed: it could not be read whole, or its checksum differs.
        """
        return self._loaded(self._row(key, Verb.complete_load))

    def discard(self, key: BlobKey) -> None:
        """Forget a blob; its slot is free now, or as soon as the transfer that touches it has ended.

        If a load into a given buffer is open, this waits for its end: no byte is written to the buffer afterwards.
        """
        row = self._row(key, Verb.discard)
        # Tensors of copies in flight go back to the allocator here: the caller's stream must not reuse them earlier.
        for transfer in (row.store, row.load):
            if transfer is not None and transfer.tensor is not None:
                self._copies.order_caller_after(transfer.move.copied)
                self._copies.order_caller_after(transfer.read)
        self._table.drop(row)
        if row.load is not None and row.load.is_given:
            self._wait(row, row.load)

    def pin(self, keys: Iterable[BlobKey]) -> Pinned:
        """Say where stored blobs lie, and keep their slots until the result's `release()`. Waits for their bytes.

        Eviction would move them: no stack that evicts is asked.

        Raises:
            KeyError: one is not there. TransferFailed: the bytes of one did not get there.
        """
        self._check_open()
        rows = [self._table.row(key, Verb.discard) for key in keys]  # what may be discarded is there
        for row in rows:
            assert row.store is not None
            if (error := self._wait(row, row.store)) is not None:
                raise failure_of(row, error)
        slots = [(row.tier, row.slot_key) for row in rows]
        return Pinned([StoredBlob.of(row) for row in rows], slots, self._lock)

    def adopt(self, blobs: Iterable[StoredBlob]) -> Pinned:
        """Take over blobs that a process before this one stored in the same ranges; they stay pinned.

        Every blob is loaded once, so that its checksums are compared now.

        Raises:
            ValueError: a blob has no place here. TransferFailed: the bytes of one are others. Nothing is taken over.
        """
        self._check_open()
        slots, stored = [], sorted(blobs, key=lambda blob: (blob.medium, blob.offset_bytes))
        with CleanUps() as undo:
            for blob in stored:
                opened = self._tiers.get(blob.medium)
                if opened is None or self._table.find(blob.key) is not None:
                    raise ValueError(f"blob {blob.key}: there is no {blob.medium.value} tier, or it has the blob")
                slot_key = SlotKey(blob.key, next(self._serials))
                with self._lock:
                    self._table.put(adopted(blob, slot_key, opened))
                undo.callback(self.discard, blob.key)
                slots.append((opened, slot_key))
            for number, blob in enumerate(stored):
                for ahead in stored[number : number + 2]:
                    if self.state(ahead.key) is BlobState.stored:
                        self.prepare_load(ahead.key)
                self._loaded(self._row(blob.key, Verb.complete_load))
            undo.pop_all()
        return Pinned(stored, slots, self._lock)

    def stats(self) -> dict[Medium, TierStats]:
        """Occupancy and traffic of every open tier."""
        self._accounts.land()
        with self._lock:
            return {medium: opened.stats() for medium, opened in self._tiers.items()}

    def reset_peaks(self) -> None:
        """Start new peaks from what is used now."""
        with self._lock:
            for opened in self._tiers.values():
                opened.ledger.reset_peak()

    def record(self) -> dict[str, Any]:
        """JSON-able facts for the run's record: engine wanted, got and why; where bytes lie; traffic and peaks."""
        self._accounts.land()
        with self._lock:
            tiers = {medium.value: opened.record() for medium, opened in self._tiers.items()}
        return {**self._facts, "device": str(self._copies.device), "exposed_s": self.exposed_s, "tiers": tiers}

    def close(self) -> None:
        """End the transfers, close the tiers; blobs are gone. May be called twice."""
        if self._closed:
            return
        self._closed = True
        with CleanUps() as closing:
            for opened in self._tiers.values():
                closing.callback(_close_tier, opened)
            closing.callback(self._table.clear)
            closing.callback(self._accounts.wait_for_landing)
            for opened in self._tiers.values():
                closing.callback(opened.threads.close)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the tier stack is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"the tier stack was opened by process {self._pid}: a forked child would write into its parent's "
                "lease; start processes with spawn and open a stack in each"
            )
        self._accounts.land()

    def _row(self, key: BlobKey, verb: Verb) -> Row:
        self._check_open()
        return self._table.row(key, verb)

    def _loaded(self, row: Row) -> torch.Tensor:
        if row.forward is not None:
            return self._complete_forward(row, row.forward)
        load = row.load
        assert load is not None
        error = self._wait(row, load)
        target, row.load = load.let_go(), None
        self._copies.order_caller_after(load.move.copied)
        if error is not None:
            raise self._table.fail(row, error)
        row.turn(Verb.complete_load)
        return target

    def _complete_forward(self, row: Row, forward: Forward) -> torch.Tensor:
        store = row.store
        assert store is not None
        assert store.tensor is not None
        row.forward = None
        self._copies.order_caller_after(store.move.ready)
        self._check_unchanged(row, store.tensor)
        row.turn(Verb.complete_load)
        self._accounts.forwarded(row)
        if forward.into is None:
            return store.tensor
        self._copies.order_caller_after(forward.ready)
        self._copies.copy(forward.into, store.tensor)
        store.read = self._copies.fence()
        return forward.into

    def _tier(self, key: BlobKey, medium: Medium, num_bytes: int) -> OpenTier:
        if medium is Medium.hbm:
            raise ValueError(f"blob {key}: what stays in hbm is not stored")
        opened = self._tiers.get(medium)
        if opened is None:
            name = medium.value
            raise TierFull(
                f"{name} tier is off: blob {key} needs {num_bytes} bytes of it; raise tiers.{name}.budget_gib above 0"
            )
        return opened

    def _check_unchanged(self, row: Row, source: torch.Tensor) -> None:
        if source._version == row.version:
            return
        error = TransferFailed(
            f"{row.key}: the tensor was changed in place while it was stored to the "
            f"{row.tier.tier.medium.value} tier; clone it first, or change it after complete_store"
        )
        raise self._table.fail(row, error)

    def _submit(self, row: Row, job: Job, urgency: Urgency) -> None:
        try:
            self._waited_s += row.tier.threads.submit(job, urgency)
        except TransferFailed as error:
            job.cancel(error)
            job.finish()
            raise stalled(row, error) from error

    def _wait(self, row: Row, transfer: Transfer) -> BaseException | None:
        begin_s, ready = time.perf_counter(), transfer.move.ready
        try:
            return row.tier.threads.wait(transfer.job, lambda: ready is not None and not ready.passed)
        except TransferFailed as error:
            raise stalled(row, error) from error
        finally:
            self._waited_s += time.perf_counter() - begin_s

    def _load_part(self, row: Row, move: Move, part: int) -> None:
        assert row.store is not None
        error = row.store.job.wait()
        if error is not None:
            raise failure_of(row, error)
        row.tier.tier.load_part(move, part)

    def _over(self, row: Row, transfer: Transfer, direction: Direction) -> None:
        with self._lock:
            transfer.over = True
            if transfer.whole:
                self._accounts.moved(row, transfer, direction)
            row.settle()


def _close_tier(opened: OpenTier) -> None:
    if not opened.threads.stalled:  # a thread that hangs in a system call still uses its file and its buffer
        opened.tier.close()
