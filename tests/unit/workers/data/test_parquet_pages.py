"""The memory that reading a Parquet file takes is bounded before pyarrow allocates it, whatever the file states."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data import parquet_pages, parquet_records
from headrace.workers.data.parquet_pages import footer_of, largest_pages
from headrace.workers.data.parquet_records import read_parquet_records

CHAT = [{"role": "user", "content": "x" * 700}, {"role": "assistant", "content": "y" * 900}]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"use_dictionary": False, "compression": "none"},
    "version 2 of pages": {"data_page_version": "2.0", "compression": "zstd"},
    "delta": {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    "small pages": {"data_page_size": 512, "dictionary_pagesize_limit": 256, "write_batch_size": 8},
    "long statistics": {"write_page_index": True, "write_statistics": True, "use_dictionary": False},
    "row groups": {"row_group_size": 7},
}


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that pyarrow is given."""
    sizes: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def spy(table: pq.ParquetFile, batch_size: int, **more: Any) -> Any:
        sizes.append(batch_size)
        return whole(table, batch_size, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    return sizes


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it."""
    number, content = number << 1, b""
    while number > 127:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["text", "messages"])
def test_no_value_is_larger_than_its_column_page(name: str, options: str, tmp_path: Path) -> None:
    values = [f"{'word' * (i % 50)}{i}" for i in range(300)] if name == "text" else [CHAT] * 30
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"other": ["z" * 5000] * len(values), name: values}), path, **OPTIONS[options])
    assert [row[name] for row, _ in read_parquet_records(path, 0)] == values
    with open(path, "rb") as stream:
        footer = footer_of(stream)
        sizes = [largest_pages(stream, footer, group, [name], "a") for group in range(len(footer[4]))]
    largest = 206 if name == "text" else 900
    assert max(sizes) >= largest
    assert max(sizes) < 60_000


def test_a_page_above_the_limit_is_refused_before_it_is_read(
    tmp_path: Path, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 3_000_000]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 14
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"a\.parquet: column text of row.*3000010 bytes.*1048576.*smaller") as error:
        list(read_parquet_records(path, 0))
    assert error.value.id is ErrorId.data_wrong
    assert not batch_sizes


def test_a_page_header_that_lies_is_refused(
    tmp_path: Path, batch_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow would allocate what it states."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * 3_000_000]}), path, compression="zstd", use_dictionary=False)
    content, honest, lie = path.read_bytes(), varint(3_000_010), varint(2**27 - 1)
    assert len(honest) == len(lie)
    assert content[:16].count(honest) == 1
    path.write_bytes(content.replace(honest, lie, 1))
    monkeypatch.setattr(parquet_pages, "MAX_PAGE_BYTES", 64 << 20)
    with pytest.raises(InputError, match=r"column text .* 134217727 bytes"):
        list(read_parquet_records(path, 0))
    assert not batch_sizes


@pytest.mark.parametrize("stated", [90_000, 9_000])
def test_sizes_that_contradict_each_other_or_the_file(stated: int, tmp_path: Path, batch_sizes: list[int]) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * 10_000]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    content = path.read_bytes()
    number, other = varint(10_010), varint(stated)
    assert content[:16].count(number) == 2
    place = content.index(number, content.index(number) + 1)
    longer = len(other) - len(number)
    path.write_bytes(content[:place] + other + content[place + len(number) + longer :])
    with pytest.raises(InputError, match=r"column text .* damaged"):
        list(read_parquet_records(path, 0))
    assert not batch_sizes


@pytest.mark.parametrize(
    ("num_bytes", "options", "most"),
    [(1_000_000, {}, 16), (100_000, {"compression": "zstd"}, 160), (10, {}, 256)],
)
def test_batches_hold_as_many_rows_as_fit_however_small_the_file(
    num_bytes: int, options: dict[str, Any], most: int, tmp_path: Path, batch_sizes: list[int], monkeypatch: Any
) -> None:
    """A dictionary holds the value once, the rows repeat it."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * num_bytes] * 300}), path, **options)
    assert pq.ParquetFile(path).metadata.row_group(0).total_byte_size < num_bytes + 1000
    monkeypatch.setattr(parquet_records, "_BATCH_BYTES", 16 << 20)
    assert sum(len(row["text"]) for row, _ in read_parquet_records(path, 0)) == 300 * num_bytes
    assert most * 0.9 < batch_sizes[0] <= most * 1.1


def test_a_large_row_group_of_small_rows_is_read_in_whole_batches(tmp_path: Path, batch_sizes: list[int]) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{i} " * 400 for i in range(20_000)]
    pq.write_table(pa.table({"text": texts}), path, use_dictionary=False, row_group_size=len(texts))
    assert pq.ParquetFile(path).metadata.row_group(0).total_byte_size > 32 << 20
    assert sum(1 for _ in read_parquet_records(path, 0)) == len(texts)
    assert batch_sizes == [256]


def repeating(path: Path, num_turns: int) -> list[list[dict[str, str]]]:
    """Two chats in a file of a few KiB; the first one repeats a text of 1 MB."""
    chats = [[{"role": "user", "content": "x" * 1_000_000}] * num_turns, CHAT]
    pq.write_table(pa.table({"messages": chats}), path, compression="zstd")
    assert path.stat().st_size < 1 << 14
    return chats


def test_a_row_that_repeats_a_long_value_is_refused_before_it_is_made(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.parquet"
    chats = repeating(path, 20)
    monkeypatch.setattr(parquet_records, "_BATCH_BYTES", 21_000_000)
    assert [row["messages"] for row, _ in read_parquet_records(path, 0)] == chats
    repeating(path, 40)
    pool = pa.default_memory_pool()
    allocated = pool.total_bytes_allocated()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"a\.parquet: row group 0: a row of 4\d{7} bytes, at most 21000000"):
            list(read_parquet_records(path, 0))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert pool.total_bytes_allocated() - allocated < 10_000_000


def test_lists_of_too_many_values_are_refused(tmp_path: Path, batch_sizes: list[int], monkeypatch: Any) -> None:
    path = tmp_path / "a.parquet"
    repeating(path, 40)
    monkeypatch.setattr(parquet_pages, "MAX_LIST_VALUES", 41)
    with pytest.raises(InputError, match=r"column messages\.list\.element\.\w+ .* lists of 42 values, at most 41"):
        list(read_parquet_records(path, 0))
    assert not batch_sizes


def test_lists_of_deltas_that_may_unfold_are_refused(tmp_path: Path, batch_sizes: list[int], monkeypatch: Any) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"messages": [[{"role": "user", "content": "x" * 100_000 + str(i)} for i in range(50)]]})
    pq.write_table(table, path, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")
    assert path.stat().st_size < 1 << 17
    assert [row["messages"] for row, _ in read_parquet_records(path, 0)] == table["messages"].to_pylist()
    batch_sizes.clear()
    monkeypatch.setattr(parquet_pages, "_MAX_REPEATED_BYTES", 4_000_000)
    with pytest.raises(InputError, match=r"messages\.list\.element\.content .* 50 values that share .* encoding"):
        list(read_parquet_records(path, 0))
    assert not batch_sizes


@pytest.mark.parametrize(
    "kind", [pa.map_(pa.string(), pa.string()), pa.list_(pa.string(), 2), pa.large_list(pa.string())]
)
def test_what_a_nested_column_repeats_is_counted(kind: pa.DataType, tmp_path: Path) -> None:
    texts = ["ab", "c" * 100]
    value = [tuple(texts)] if pa.types.is_map(kind) else texts
    plain = pa.array([value] * 10, kind)
    assert parquet_records._repeated_bytes(plain.slice(2, 5)) >= 5 * 102
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["t"], "messages": pa.array([value], kind)}), path)
    assert [row["messages"] for row, _ in read_parquet_records(path, 0)] == [value]
