"""The one class that workers see: six verbs over the tiers of a rank.

    lookup(key)                      the state of a block
    prepare_store / complete_store   bytes leave the device; until complete_store the stack holds the tensor
    prepare_load / complete_load     bytes come back; complete_load returns the tensor
    discard(key)                     the slot is free for another block

A `prepare` returns at once, a `complete` waits for what is left to wait for. storage/README.md draws a block's life.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headrace.storage.blockio.thread_pool import IoThreads, Job, Urgency
from headrace.storage.blocks import Block, BlockState, OpenTier, SlotKey, Transfer, failure_of, stalled
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.ledger import Slot
from headrace.storage.core.records import Direction, LookupResult, Medium, TierStats, TransferRecord
from headrace.storage.eviction import move_to_drive
from headrace.storage.source import storable
from headrace.storage.tier import Blob, Move, Tier, as_bytes
from headrace.storage.transfer import DeviceCopies
from headrace.storage.transfer_log import TransferLog


class TierStack:
    """Stores tensors in tiers and brings them back bit-equal. One caller thread; the stack's own threads move bytes.

    A verb on an unknown key raises KeyError, a verb that the block's state does not allow RuntimeError: both are
    mistakes of the caller. What the machine does wrong is TierFull or TransferFailed.

    Args:
        tiers: at most one per medium; closed with the stack.
        copies: of the device of the caller's tensors.
        threads: move the parts, a pool per medium; closed with the stack.
        log: gets every finished transfer.
        evict: where host memory is full, the blocks needed last spill to the drive; with False that is TierFull.
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
        self._log = log
        self._evict = evict and {Medium.host, Medium.ssd} <= self._tiers.keys()
        self._facts = facts or {}
        self._blocks: dict[BlockKey, Block] = {}
        self._serials = itertools.count()
        self._lock = threading.Lock()
        self._landing: list[tuple[Block, Transfer]] = []
        self._waited_s = 0.0
        self._pid = os.getpid()
        self._closed = False

    @property
    def exposed_s(self) -> float:
        """Seconds that the caller waited so far: in the verbs, and on CUDA its stream for copies."""
        return self._waited_s + self._copies.stalled_s()

    def lookup(self, key: BlockKey) -> LookupResult:
        """Whether the block is absent, on its way in, or whole. A failed one is a miss: its bytes are not to be had."""
        with self._lock:
            block = self._blocks.get(key)
            if block is None or block.state is BlockState.failed:
                return LookupResult.miss
            return LookupResult.pending if block.state is BlockState.preparing else LookupResult.hit

    def state(self, key: BlockKey) -> BlockState:
        """The block's state. Raises KeyError."""
        with self._lock:
            return self._block(key).state

    def prepare_store(
        self, key: BlockKey, tensor: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        """Start to move a tensor into a tier; it must not be changed in place before complete_store.

        Waits only where more stores are queued than the threads take, or blocks are evicted (metered as exposed).

        Args:
            tensor: any dtype and shape, on the stack's device; a copy is made where it is not contiguous.
            medium: host or ssd.
            next_use: when the plan needs the block again, any growing number; None is last. Orders eviction.

        Raises:
            TierFull: the tier is off or has no room; nothing changed.
            InputError: the tensor is sparse or on another device.
        """
        self._check_open()
        if key in self._blocks:
            raise RuntimeError(f"block {key} was stored and not discarded; a key holds one tensor at a time")
        source = storable(key, tensor, self._copies.device)
        opened = self._tier(key, medium, source.nbytes)
        slot_key = SlotKey(key, next(self._serials))
        slot = self._reserve(opened, slot_key, source.nbytes, next_use)
        blob = Blob(str(key), slot.offset_bytes, source.nbytes)
        block = Block(slot_key, opened, blob, source.shape, source.dtype, source._version)
        with self._lock:
            after = opened.fences_in(slot)
        move = Move(blob, as_bytes(source), self._copies.fence(), after)
        try:
            opened.tier.begin_store(move)
            block.launched(move)
        except BaseException:
            with self._lock:
                block.free_slot()
            raise
        job = Job(
            lambda part: opened.tier.store_part(move, part),
            opened.tier.num_parts(blob),
            on_done=lambda done: self._store_over(block, transfer, done),
            helpable=None if move.ready is None else lambda: move.ready is not None and move.ready.passed,
        )
        block.store = transfer = Transfer(job, move, source)
        self._blocks[key] = block
        try:
            self._submit(block, job, Urgency.store)
        except TransferFailed:
            self.discard(key)
            raise

    def complete_store(self, key: BlockKey) -> None:
        """Let go of the source: after this the caller may change or free it. Once per prepare_store.

        Waits for the bytes to be whole in the tier. On CUDA a copy into host memory is not waited for: the caller's
        stream is ordered after it, and should the bytes be damaged there, the load says so.

        Raises:
            TransferFailed: the bytes did not get there, or the source was changed in place meanwhile.
        """
        self._check_open()
        block = self._block(key)
        assert block.store is not None
        if not block.store_open:
            raise RuntimeError(f"the store of block {key} was completed twice")
        error = None
        if block.store.move.copied is not None and not block.store.job.done:
            self._copies.order_caller_after(block.store.move.copied)
        else:
            error = self._wait(block, block.store)
        source, block.store_open = block.store.let_go(), False
        if error is not None:
            raise failure_of(block, error)
        self._check_unchanged(block, source)

    def prepare_load(self, key: BlockKey) -> None:
        """Start to bring a block back. Where its store still runs and holds the source, the source is the answer.

        Raises:
            TransferFailed: its store failed.
        """
        self._check_open()
        block = self._block(key)
        assert block.store is not None
        if block.load is not None or block.forwarded is not None:
            raise RuntimeError(f"block {key} is being loaded already")
        if block.state is BlockState.failed:
            raise failure_of(block, block.store.job.error)
        if block.store.tensor is not None and not block.store.job.done:
            block.forwarded = block.store.tensor
            block.tier.forwarded_blocks += 1
            return
        target = self._copies.target(block.shape, block.dtype)
        move = Move(block.blob, as_bytes(target), self._copies.fence(), tuple(block.copies))
        block.tier.tier.begin_load(move)
        block.launched(move)
        job = Job(
            lambda part: self._load_part(block, move, part),
            block.tier.tier.num_parts(block.blob),
            on_done=lambda done: self._load_over(block, transfer, done),
        )
        with self._lock:
            block.load = transfer = Transfer(job, move, target)
            if block.store.over and block.state is not BlockState.failed:
                block.pin()
        self._submit(block, job, Urgency.load)

    def complete_load(self, key: BlockKey) -> torch.Tensor:
        """The block's tensor, bit-equal to what was stored, on the stack's device. It stays stored until discarded.

        Raises:
            TransferFailed: it could not be read whole, or its checksum differs.
        """
        self._check_open()
        block = self._block(key)
        assert block.store is not None
        if block.forwarded is not None:
            tensor, block.forwarded = block.forwarded, None
            self._copies.order_caller_after(block.store.move.ready)
            self._check_unchanged(block, tensor)
            return tensor
        load = block.load
        if load is None or load.tensor is None:
            raise RuntimeError(f"the load of block {key} was completed without a prepare_load")
        error = self._wait(block, load)
        target, load.tensor, block.load = load.tensor, None, None
        self._copies.order_caller_after(load.move.copied)
        if error is not None:
            raise failure_of(block, error)
        with self._lock:
            block.state = BlockState.stored
        return target

    def discard(self, key: BlockKey) -> None:
        """Forget a block; its slot is free now, or as soon as the transfer that touches it has ended."""
        self._check_open()
        block = self._block(key)
        del self._blocks[key]
        # Tensors of copies in flight go back to the allocator here: the caller's stream must not reuse them earlier.
        for transfer in (block.store, block.load):
            if transfer is not None and transfer.tensor is not None:
                self._copies.order_caller_after(transfer.move.copied)
        with self._lock:
            block.discarded = True
            if block.idle:
                block.free_slot()

    def stats(self) -> dict[Medium, TierStats]:
        """Occupancy and traffic of every open tier."""
        self._land()
        with self._lock:
            return {medium: opened.stats() for medium, opened in self._tiers.items()}

    def reset_peaks(self) -> None:
        """Start new peaks from what is used now."""
        with self._lock:
            for opened in self._tiers.values():
                opened.ledger.reset_peak()

    def record(self) -> dict[str, Any]:
        """JSON-able facts for the run's record: engine wanted, got and why; where bytes lie; traffic and peaks."""
        self._land()
        with self._lock:
            tiers = {medium.value: opened.record() for medium, opened in self._tiers.items()}
        return {**self._facts, "device": str(self._copies.device), "exposed_s": self.exposed_s, "tiers": tiers}

    def close(self) -> None:
        """End the transfers, close the tiers; blocks are gone. May be called twice."""
        if self._closed:
            return
        self._closed = True
        with CleanUps() as closing:
            for opened in self._tiers.values():
                closing.callback(_close_tier, opened)
            closing.callback(self._blocks.clear)
            closing.callback(self._wait_for_landing)
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
        self._land()

    def _block(self, key: BlockKey) -> Block:
        try:
            return self._blocks[key]
        except KeyError:
            raise KeyError(f"no block {key} in the tiers") from None

    def _tier(self, key: BlockKey, medium: Medium, num_bytes: int) -> OpenTier:
        if medium is Medium.hbm:
            raise ValueError(f"block {key}: what stays in hbm is not stored")
        opened = self._tiers.get(medium)
        if opened is None:
            name = medium.value
            raise TierFull(
                f"{name} tier is off: block {key} needs {num_bytes} bytes of it; raise tiers.{name}.budget_gib above 0"
            )
        return opened

    def _reserve(self, opened: OpenTier, slot_key: SlotKey, num_bytes: int, next_use: float | None) -> Slot:
        while True:
            with self._lock:
                try:
                    return opened.ledger.prepare(slot_key, num_bytes, next_use=next_use)
                except TierFull:
                    if not self._evict or opened.tier.medium is not Medium.host:
                        raise
                    victims = opened.ledger.victims(num_bytes)
                    arriving = [b for b in self._blocks.values() if b.tier is opened and b.store and not b.store.over]
                    if victims is None and not arriving:
                        raise
            if victims is None:
                block = arriving[0]
                assert block.store is not None
                self._wait(block, block.store)  # once it is whole it may be evicted
                continue
            begin_s = time.perf_counter()
            blocks = [block for block in self._blocks.values() if block.slot_key in victims]
            move_to_drive(blocks, self._tiers[Medium.ssd], self._lock, self._log)
            self._waited_s += time.perf_counter() - begin_s

    def _check_unchanged(self, block: Block, source: torch.Tensor | None) -> None:
        if source is None or source._version == block.version:
            return
        with self._lock:
            block.state = BlockState.failed
        raise TransferFailed(
            f"{block.key}: the tensor was changed in place while it was stored to the "
            f"{block.tier.tier.medium.value} tier; clone it first, or change it after complete_store"
        )

    def _submit(self, block: Block, job: Job, urgency: Urgency) -> None:
        try:
            self._waited_s += block.tier.threads.submit(job, urgency)
        except TransferFailed as error:
            job.cancel(error)
            job.finish()
            raise stalled(block, error) from error

    def _wait(self, block: Block, transfer: Transfer) -> BaseException | None:
        begin_s, ready = time.perf_counter(), transfer.move.ready
        try:
            return block.tier.threads.wait(transfer.job, lambda: ready is not None and not ready.passed)
        except TransferFailed as error:
            raise stalled(block, error) from error
        finally:
            self._waited_s += time.perf_counter() - begin_s

    def _load_part(self, block: Block, move: Move, part: int) -> None:
        assert block.store is not None
        if block.store.job.wait() is not None:
            raise failure_of(block, block.store.job.error)
        block.tier.tier.load_part(move, part)

    def _store_over(self, block: Block, store: Transfer, job: Job) -> None:
        with self._lock:
            store.over = True
            if job.error is None:
                block.tier.ledger.complete(block.slot_key)
                self._count(block, store, Direction.store)
                if block.state is BlockState.preparing:
                    block.state = BlockState.stored
                if block.load is not None and not block.load.over:
                    block.pin()
            else:
                block.state = BlockState.failed
            if block.discarded and block.idle:
                block.free_slot()

    def _load_over(self, block: Block, load: Transfer, job: Job) -> None:
        with self._lock:
            load.over = True
            block.unpin()
            if job.error is not None:
                block.state = BlockState.failed
            elif load.move.copied is not None:
                self._landing.append((block, load))
            else:
                self._count(block, load, Direction.load)
            if block.discarded and block.idle:
                block.free_slot()

    def _land(self) -> None:
        """Log the device copies that have ended since the last operation; the host does not wait for them."""
        if not self._landing:
            return
        with self._lock:
            landing, self._landing = self._landing, []
            for block, load in landing:
                if load.move.copied is not None and not load.move.copied.passed:
                    self._landing.append((block, load))
                    continue
                load.move.span_s = self._copies.wait(load.move.copied)
                self._count(block, load, Direction.load)

    def _wait_for_landing(self) -> None:
        for _, transfer in self._landing:
            self._copies.wait(transfer.move.copied)
        self._land()

    def _count(self, block: Block, transfer: Transfer, direction: Direction) -> None:
        job, opened = transfer.job, block.tier
        start_s, end_s = transfer.move.span_s or (job.start_s, job.end_s)
        opened.moved_bytes[direction] += block.blob.num_bytes
        opened.busy[direction].add(start_s, end_s)
        medium = opened.tier.medium
        self._log.append(
            TransferRecord(str(block.key), block.blob.num_bytes, medium, direction, job.submit_s, start_s, end_s)
        )


def _close_tier(opened: OpenTier) -> None:
    if not opened.threads.stalled:  # a thread that hangs in a system call still uses its file and its buffer
        opened.tier.close()
