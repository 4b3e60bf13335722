"""The record of every move: source of the memory trace, of the Gantt picture and of the bytes-moved assertions."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Medium, TransferRecord

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("key", "bytes", "tier", "direction", "submit_s", "start_s", "end_s", "rank")


class TransferLog:
    """Finished moves of one rank, in the order in which they ended. Threads may append at once.

    Args:
        rank: global rank, written into every row.
        spool_folder: where rows go once there are `spool_records` of them; None keeps all in memory.
        spool_records: rows held in memory at most, when there is a folder. Where the disk does not take them they
            are left out of the log and counted in `num_left_out`; `moved_bytes` counts them all the same.

    Attributes:
        moved_bytes: by tier and direction.
        forwarded_bytes: by tier, of loads that the source answered. They moved nothing and have no row.
    """

    def __init__(self, rank: int = 0, *, spool_folder: Path | None = None, spool_records: int = 200_000) -> None:
        self.rank = rank
        self.num_left_out = 0
        self.moved_bytes: Counter[tuple[Medium, Direction]] = Counter()
        self.forwarded_bytes: Counter[Medium] = Counter()
        self._records: list[TransferRecord] = []
        self._spool_folder = spool_folder
        self._spool_records = spool_records
        self._spooled: list[Path] = []
        self._lock = threading.Lock()

    @property
    def records(self) -> Sequence[TransferRecord]:
        """The moves in memory: all of them, unless rows were spooled."""
        with self._lock:
            return tuple(self._records)

    def append(self, record: TransferRecord) -> None:
        """Add one finished move."""
        with self._lock:
            self._records.append(record)
            self.moved_bytes[record.tier, record.direction] += record.num_bytes
            if self._spool_folder is not None and len(self._records) >= self._spool_records:
                self._spool(self._spool_folder)

    def count_forwarded(self, tier: Medium, num_bytes: int) -> None:
        """Count a load that moved nothing."""
        with self._lock:
            self.forwarded_bytes[tier] += num_bytes

    def write_parquet(self, path: Path) -> None:
        """Write every move so far, spooled ones first, to `path`: whole or not at all. May be called again later."""
        with self._lock:
            rows = _table(self._records, self.rank)
            spooled = list(self._spooled)
        _write(path, spooled, rows)

    def close(self) -> None:
        """Remove the spooled rows; write_parquet has copied them."""
        with self._lock:
            for path in self._spooled:
                path.unlink(missing_ok=True)
            self._spooled.clear()

    def _spool(self, folder: Path) -> None:
        path = folder / f".transfers-rank{self.rank}-{len(self._spooled)}.parquet"
        try:
            _write(path, [], _table(self._records, self.rank))
            self._spooled.append(path)
        except OSError as error:  # a full disk; to keep the rows would fill the memory too
            if not self.num_left_out:
                warnings.warn(f"{path}: {error}; moves are left out of the transfer log", stacklevel=2)
            self.num_left_out += len(self._records)
        self._records.clear()


def merge_parquet(parts: Sequence[Path], out: Path) -> None:
    """Join the files of several ranks into one, in the order given.

    Raises:
        InputError: a part is missing, damaged or no transfer log; `out` is left as it was.
    """
    _write(out, parts, None)


def _table(records: Sequence[TransferRecord], rank: int) -> pyarrow.Table:
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        "key": [r.key for r in records],
        "bytes": [r.num_bytes for r in records],
        "tier": [r.tier.value for r in records],
        "direction": [r.direction.value for r in records],
        "submit_s": [r.submit_s for r in records],
        "start_s": [r.start_s for r in records],
        "end_s": [r.end_s for r in records],
        "rank": [rank] * len(records),
    }
    return pa.table(columns, schema=_schema())


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    types = [pa.string(), pa.int64(), pa.string(), pa.string(), pa.float64(), pa.float64(), pa.float64(), pa.int32()]
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def _write(out: Path, parts: Sequence[Path], rows: pyarrow.Table | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished")
    try:
        with pq.ParquetWriter(unfinished, _schema()) as writer:
            for part in parts:
                try:
                    with pq.ParquetFile(part) as source:
                        for batch in source.iter_batches(columns=list(COLUMNS)):
                            writer.write_table(pa.Table.from_batches([batch]).cast(_schema()))
                except (OSError, pa.ArrowException, ValueError) as error:
                    raise InputError(f"{part} cannot be read as a transfer log: {error}") from error
            if rows is not None:
                writer.write_table(rows)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
