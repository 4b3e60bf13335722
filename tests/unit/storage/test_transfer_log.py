"""What was moved, as columns; whole files or none."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Direction, Medium, TransferRecord
from headrace.storage.transfer_log import COLUMNS, TransferLog, merge_parquet


def fill(log: TransferLog, num: int) -> None:
    for index in range(num):
        medium, direction = list(Medium)[index % 3], list(Direction)[index % 2]
        log.append(TransferRecord(f"s0.l{index}", 100 + index, medium, direction, index, index + 0.25, index + 0.5))


def test_columns_types_and_values(tmp_path: Path) -> None:
    log = TransferLog(rank=7)
    fill(log, 3)
    log.write_parquet(tmp_path / "new" / "transfers.parquet")
    table = pq.read_table(tmp_path / "new" / "transfers.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert table.to_pylist()[1] == {
        "key": "s0.l1", "bytes": 101, "tier": "host", "direction": "load",
        "submit_s": 1.0, "start_s": 1.25, "end_s": 1.5, "rank": 7,
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["transfers.parquet"]


def test_an_empty_log_is_a_file_with_columns(tmp_path: Path) -> None:
    TransferLog().write_parquet(tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert (table.num_rows, tuple(table.column_names)) == (0, COLUMNS)


def test_rows_spill_to_disk_and_come_back(tmp_path: Path) -> None:
    log = TransferLog(spool_folder=tmp_path / "spool", spool_records=10)
    fill(log, 35)
    assert len(log.records) == 5
    assert sum(log.moved_bytes.values()) == sum(range(100, 135))
    for _ in range(2):
        log.write_parquet(tmp_path / "t.parquet")
        assert pq.read_table(tmp_path / "t.parquet")["key"].to_pylist() == [f"s0.l{i}" for i in range(35)]
    log.close()
    assert list((tmp_path / "spool").iterdir()) == []


def test_ranks_are_merged(tmp_path: Path) -> None:
    parts = []
    for rank in range(3):
        log = TransferLog(rank=rank)
        fill(log, 2)
        parts.append(tmp_path / f"rank{rank}.parquet")
        log.write_parquet(parts[-1])
    merge_parquet(parts, tmp_path / "all.parquet")
    assert pq.read_table(tmp_path / "all.parquet")["rank"].to_pylist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_part_is_named_and_the_old_file_stays(tmp_path: Path, damage: str) -> None:
    good, bad, out = tmp_path / "good.parquet", tmp_path / "bad.parquet", tmp_path / "all.parquet"
    log = TransferLog()
    fill(log, 2)
    log.write_parquet(good)
    out.write_bytes(b"yesterday")
    if damage == "truncated":
        bad.write_bytes(good.read_bytes()[:-10])
    elif damage == "foreign":
        import pyarrow as pa

        pq.write_table(pa.table({"x": [1]}), bad)
    with pytest.raises(InputError, match=r"bad\.parquet"):
        merge_parquet([good, bad], out)
    assert out.read_bytes() == b"yesterday"
    assert not list(tmp_path.glob(".*"))
