"""Makes room in host memory: blobs that the plan needs last spill to the drive.

A solved plan never needs this: its tiers are as large as what it sends there. It is for callers whose stores are not
known in advance, where `tiers.host.evict` says that a full slab is no error. The ledger names the victims (next-use
eviction); here their bytes move, and the caller waits: it is held back as by a full queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from threading import Lock

from headrace.storage.accounts import Accounts
from headrace.storage.blockio.thread_pool import Job, Urgency
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import TierFull, TransferFailed
from headrace.storage.core.ledger import Slot
from headrace.storage.core.records import Medium
from headrace.storage.open_tier import OpenTier, SlotKey
from headrace.storage.table import Row, Table, Transfer
from headrace.storage.tier import Blob, Move
from headrace.storage.tiers.host import HostTier


class Room:
    """Finds room for a blob.

    Args:
        table: the blobs that may be evicted.
        drive: where they go; None: a full tier is TierFull.
        wait: waits for the end of a blob's store.

    Attributes:
        waited_s: how long the caller waited for evictions.
    """

    def __init__(
        self,
        table: Table,
        drive: OpenTier | None,
        lock: Lock,
        accounts: Accounts,
        wait: Callable[[Row, Transfer], object],
    ) -> None:
        self._table, self._drive, self._lock, self._accounts, self._wait = table, drive, lock, accounts, wait
        self.waited_s = 0.0

    def reserve(self, opened: OpenTier, slot_key: SlotKey, num_bytes: int, next_use: float | None) -> Slot:
        """A slot. Raises TierFull if there is no room and none can be made; TransferFailed as move_to_drive."""
        while True:
            with self._lock:
                try:
                    return opened.ledger.prepare(slot_key, num_bytes, next_use=next_use)
                except TierFull:
                    if self._drive is None or opened.tier.medium is not Medium.host:
                        raise
                    victims = opened.ledger.victims(num_bytes)
                    rows = [row for row in self._table if row.tier is opened]
                    arriving = [row.store for row in rows if row.store is not None and not row.store.over]
                    if victims is None and not arriving:
                        raise
            if victims is None:  # what arrives may be evicted once it is whole
                first = next(row for row in rows if row.store is arriving[0])
                self._wait(first, arriving[0])
                continue
            begin_s = time.perf_counter()
            move_to_drive([row for row in rows if row.slot_key in victims], self._drive, self._lock, self._accounts)
            self.waited_s += time.perf_counter() - begin_s


def move_to_drive(victims: Sequence[Row], drive: OpenTier, lock: Lock, accounts: Accounts) -> None:
    """Copy whole, idle blobs of host memory to the drive, and free their host slots. Blocks until it is done.

    Raises:
        TierFull: the drive has no room for one of them. TransferFailed: one did not get there, or its bytes in host
            memory are not those that were stored. The blobs moved before it are on the drive, the others where they
            were.
    """
    with CleanUps() as ending:
        for row in victims:
            ending.callback(_finish, row, _start(row, drive, lock), drive, lock, accounts)


def _start(row: Row, drive: OpenTier, lock: Lock) -> Transfer:
    source = row.tier.tier
    assert isinstance(source, HostTier), "only host memory is made room in"
    data = source.resident(row.blob)
    with lock:
        next_use = row.tier.ledger.slot(row.slot_key).next_use
        slot: Slot = drive.ledger.prepare(row.slot_key, row.blob.num_bytes, next_use=next_use)
    move = Move(Blob(row.blob.label, slot.offset_bytes, row.blob.num_bytes), data, None)
    job = Job(lambda part: drive.tier.store_part(move, part), drive.tier.num_parts(move.blob), num_bytes=slot.num_bytes)
    try:
        drive.threads.submit(job, Urgency.store)
    except TransferFailed:
        with lock:
            drive.ledger.free(row.slot_key)
        raise
    return Transfer(job, move, None)


def _finish(row: Row, transfer: Transfer, drive: OpenTier, lock: Lock, accounts: Accounts) -> None:
    # Raises where it takes too long: a thread may still write to the slot, which stays.
    error = drive.threads.wait(transfer.job)
    with lock:
        if error is not None:
            drive.ledger.free(row.slot_key)
            raise TransferFailed(f"{row.key}: moving it from host memory to the drive failed: {error}") from error
        row.free_slot()
        source, row.tier, row.blob, row.copies = row.tier, drive, transfer.move.blob, []
        row.settle()
        accounts.evicted(row, source, transfer)
