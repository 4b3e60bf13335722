"""Makes room in host memory: blocks that the plan needs last spill to the drive.

A solved plan never needs this: its tiers are as large as what it sends there. It is for callers whose stores are not
known in advance, where `tiers.host.evict` says that a full slab is no error. The ledger names the victims (next-use
eviction); here their bytes move, and the caller waits: it is held back as by a full queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

from headrace.storage.blockio.thread_pool import Job, Urgency
from headrace.storage.blocks import Block, OpenTier
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.ledger import Slot
from headrace.storage.core.records import Direction, TransferRecord
from headrace.storage.tier import Blob, Move
from headrace.storage.tiers.host import HostTier
from headrace.storage.transfer_log import TransferLog


def move_to_drive(victims: Sequence[Block], drive: OpenTier, lock: Lock, log: TransferLog) -> None:
    """Copy whole, idle blocks of host memory to the drive, and free their host slots. Blocks until it is done.

    Raises:
        TierFull: the drive has no room for one of them. TransferFailed: one did not get there, or its bytes in host
            memory are not those that were stored. The blocks moved before it are on the drive, the others where they
            were.
    """
    with CleanUps() as ending:
        for block in victims:
            move, job = _start(block, drive, lock)
            ending.callback(_finish, block, move, job, drive, lock, log)


def _start(block: Block, drive: OpenTier, lock: Lock) -> tuple[Move, Job]:
    source = block.tier.tier
    assert isinstance(source, HostTier), "only host memory is made room in"
    data = source.resident(block.blob)
    with lock:
        next_use = block.tier.ledger.slot(block.slot_key).next_use
        slot: Slot = drive.ledger.prepare(block.slot_key, block.blob.num_bytes, next_use=next_use)
    move = Move(Blob(block.blob.label, slot.offset_bytes, block.blob.num_bytes), data, None)
    job = Job(lambda part: drive.tier.store_part(move, part), drive.tier.num_parts(move.blob))
    try:
        drive.threads.submit(job, Urgency.store)
    except TransferFailed:
        with lock:
            drive.ledger.abandon(block.slot_key)
        raise
    return move, job


def _finish(block: Block, move: Move, job: Job, drive: OpenTier, lock: Lock, log: TransferLog) -> None:
    error = drive.threads.wait(job)  # raises where it takes too long: a thread may still write to the slot, which stays
    if error is not None:
        with lock, suppress(KeyError):
            drive.ledger.abandon(block.slot_key)
        raise TransferFailed(f"{block.key}: moving it from host memory to the drive failed: {error}") from error
    num_bytes = move.blob.num_bytes
    with lock:
        drive.ledger.complete(block.slot_key)
        block.free_slot()
        block.tier.evicted_blocks += 1
        block.tier, block.blob, block.copies = drive, move.blob, []
        drive.moved_bytes[Direction.store] += num_bytes
        drive.busy[Direction.store].add(job.start_s, job.end_s)
    medium = drive.tier.medium
    log.append(TransferRecord(str(block.key), num_bytes, medium, Direction.store, job.submit_s, job.start_s, job.end_s))
