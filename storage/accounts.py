"""What moved and when: the tiers' counters and the transfer log. Forwarded loads move nothing; they count apart."""

from __future__ import annotations

from threading import Lock

from headrace.storage.core.records import Direction, TransferRecord
from headrace.storage.open_tier import OpenTier
from headrace.storage.table import Row, Transfer
from headrace.storage.transfer import DeviceCopies
from headrace.storage.transfer_log import TransferLog


class Accounts:
    """Counts the transfers of one stack.

    Args:
        lock: the stack's. The caller of `moved` and `evicted` holds it.
    """

    def __init__(self, log: TransferLog, copies: DeviceCopies, lock: Lock) -> None:
        self._log, self._copies, self._lock = log, copies, lock
        self._landing: list[tuple[Row, Transfer]] = []

    def moved(self, row: Row, transfer: Transfer, direction: Direction) -> None:
        """Count a transfer that is over. A load that is a device copy counts when the copy has ended: see `land`."""
        if direction is Direction.load and transfer.move.copied is not None:
            self._landing.append((row, transfer))
        else:
            self._count(row, transfer, direction)

    def forwarded(self, row: Row) -> None:
        """Count a load that the source answered: no bytes moved."""
        row.tier.forwarded_blobs += 1
        row.tier.forwarded_bytes += row.blob.num_bytes
        self._log.count_forwarded(row.tier.tier.medium, row.blob.num_bytes)

    def evicted(self, row: Row, source: OpenTier, transfer: Transfer) -> None:
        """Count a blob that has gone from `source` to the tier where it is now."""
        source.evicted_blobs += 1
        self._count(row, transfer, Direction.store)

    def land(self) -> None:
        """Log the device copies that have ended since the last operation; the host does not wait for them."""
        if not self._landing:
            return
        with self._lock:
            landing, self._landing = self._landing, []
            for row, load in landing:
                if load.move.copied is not None and not load.move.copied.passed:
                    self._landing.append((row, load))
                    continue
                load.move.span_s = self._copies.wait(load.move.copied)
                self._count(row, load, Direction.load)

    def wait_for_landing(self) -> None:
        """Wait for the device copies in flight, and log them."""
        for _, transfer in self._landing:
            self._copies.wait(transfer.move.copied)
        self.land()

    def _count(self, row: Row, transfer: Transfer, direction: Direction) -> None:
        job, opened, num_bytes = transfer.job, row.tier, row.blob.num_bytes
        start_s, end_s = transfer.move.span_s or (job.start_s, job.end_s)
        opened.moved_bytes[direction] += num_bytes
        opened.busy[direction].add(start_s, end_s)
        medium = opened.tier.medium
        self._log.append(TransferRecord(str(row.key), num_bytes, medium, direction, job.submit_s, start_s, end_s))
