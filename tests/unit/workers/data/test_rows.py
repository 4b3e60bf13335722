"""Packing into rows on disk, against a naive packer; full disks."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from headrace.storage.core.errors import InputError, MachineError
from headrace.workers.data.rows import FLAGS_FILE, STARTS, TARGET, TOKENS_FILE, RowWriter, npy_header, token_dtype

Documents = list[tuple[list[int], list[int]]]


def random_documents(seed: int, vocab_size: int) -> Documents:
    generator = random.Random(seed)
    lengths = [generator.choice([1, 2, 5, 9, 10, 11, 33]) for _ in range(20)]
    return [
        ([generator.randrange(vocab_size) for _ in range(n)], [STARTS | TARGET] + [TARGET] * (n - 1)) for n in lengths
    ]


def naive_rows(documents: Documents, num_columns: int, padding: int) -> tuple[list[list[int]], list[list[int]]]:
    ids = [i for document, _ in documents for i in document]
    flags = [f for _, document in documents for f in document]
    while len(ids) % num_columns:
        flags.append(STARTS if len(ids) == sum(len(d) for d, _ in documents) else 0)
        ids.append(padding)
    rows = [ids[i : i + num_columns] for i in range(0, len(ids), num_columns)]
    marks = [flags[i : i + num_columns] for i in range(0, len(ids), num_columns)]
    for row in marks:
        row[0] |= STARTS
    return rows, marks


def write(folder: Path, documents: Documents, *, seq_len: int, vocab_size: int, **options: int) -> RowWriter:
    writer = RowWriter(folder, seq_len=seq_len, vocab_size=vocab_size, **options)
    for ids, flags in documents:
        writer.append(np.array(ids, dtype=np.int64), np.array(flags, dtype=np.uint8), where="here")
    return writer


@pytest.mark.parametrize("vocab_size", [50, 1 << 16, (1 << 16) + 1, 200_000])
@pytest.mark.parametrize("seq_len", [1, 9, 10, 64])
def test_rows_equal_the_naive_packing(tmp_path: Path, vocab_size: int, seq_len: int) -> None:
    documents = random_documents(seq_len, vocab_size)
    writer = write(tmp_path, documents, seq_len=seq_len, vocab_size=vocab_size)
    num_rows = writer.finish(padding_id=7)
    tokens, flags = np.load(tmp_path / TOKENS_FILE), np.load(tmp_path / FLAGS_FILE)
    rows, marks = naive_rows(documents, seq_len + 1, padding=7)
    assert tokens.tolist() == rows
    assert flags.tolist() == marks
    assert tokens.shape == (num_rows, seq_len + 1)
    assert tokens.dtype == token_dtype(vocab_size)
    assert tokens.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
    assert writer.num_targets == sum(mark & 3 == TARGET for row in marks for mark in row)


def test_going_on_at_a_position_gives_the_same_files(tmp_path: Path) -> None:
    documents = random_documents(1, 100)
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", documents, seq_len=9, vocab_size=100).finish(0)
    write(tmp_path, documents[:8], seq_len=9, vocab_size=100).close()
    position = sum(len(ids) for ids, _ in documents[:5])
    write(tmp_path, documents[5:], seq_len=9, vocab_size=100, position=position).finish(0)
    for name in (TOKENS_FILE, FLAGS_FILE):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_header_is_of_one_size_however_many_rows() -> None:
    assert len(npy_header(np.dtype(np.uint16), 0, 2)) == len(npy_header(np.dtype(np.uint32), 10**12, 4_000_001)) == 128


@pytest.mark.parametrize("bad", [100, -1])
def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path, bad: int) -> None:
    writer = RowWriter(tmp_path, seq_len=4, vocab_size=100)
    with pytest.raises(InputError, match=rf"file line 3: token id {bad} .* vocabulary of 100"):
        writer.append(np.array([5, bad]), np.zeros(2, dtype=np.uint8), where="file line 3")
    assert writer.position == 0


@pytest.mark.parametrize("name", [TOKENS_FILE, FLAGS_FILE])
def test_a_full_disk_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(MachineError, match=rf"{name}.*No space left.*GiB free"):
        RowWriter(tmp_path, seq_len=4, vocab_size=100)
