"""Files to pieces: nothing lost, any cursor goes on exactly, and every fault is named with its line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.data import readers
from headrace.workers.data.config import DataConfig, SourceFormat
from headrace.workers.data.readers import Cursor, Piece, ReadTally, read_pieces, split_text
from headrace.workers.data.sources import find_source

Config = Callable[..., DataConfig]
WriteJsonl = Callable[..., Path]


def read(
    config: DataConfig,
    *,
    start: Cursor | None = None,
    tally: ReadTally | None = None,
) -> list[Piece]:
    tally = ReadTally() if tally is None else tally
    return list(read_pieces(find_source(config), start=start or Cursor(), tally=tally, max_bytes=config.max_bytes))


def documents(pieces: list[Piece]) -> list[Any]:
    result: list[Any] = []
    for piece in pieces:
        if piece.starts:
            result.append(piece.content)
        else:
            result[-1] += piece.content
    assert sum(piece.ends for piece in pieces) == len(result)
    return result


def random_text(num_chars: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("ab\nä水😀 ", [5, 5, 1, 2, 2, 2, 3], k=num_chars))


@pytest.mark.parametrize("piece_bytes", [4, 7, 64, 1000])
def test_text_comes_whole_in_pieces_of_bounded_size(
    tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", piece_bytes)
    texts = {f"{i}.txt": random_text(300, i) for i in range(3)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    tally = ReadTally()
    pieces = read(data_config(tmp_path), tally=tally)
    assert documents(pieces) == list(texts.values())
    assert max(len(str(piece.content).encode()) for piece in pieces) <= 2 * piece_bytes
    assert tally.source_bytes == sum(len(text.encode()) for text in texts.values())


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "source_tree"])
@pytest.mark.parametrize("max_bytes", [None, 700])
def test_every_cursor_goes_on_exactly(
    tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, max_bytes: int | None
) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 50)
    monkeypatch.setattr(split_text, "__defaults__", (50,))
    texts = [random_text(n, n) for n in (10, 200, 1, 140, 30, 170, 60)]
    for part in (0, 1):
        half, name = texts[part::2], f"part{part}"
        if kind == "jsonl":
            (tmp_path / f"{name}.jsonl").write_text("\n\n".join(json.dumps({"text": t}) for t in half))
        elif kind == "parquet":
            pq.write_table(
                pa.table({"n": list(range(len(half))), "text": half}), tmp_path / f"{name}.parquet", row_group_size=2
            )
        else:
            for i, text in enumerate(half):
                suffix = ".py" if kind == "source_tree" else ".txt"
                (tmp_path / f"{name}{i}{suffix}").write_text(text, encoding="utf-8", newline="")
    config = data_config(tmp_path, format=SourceFormat(kind), max_bytes=max_bytes)
    whole = read(config)
    assert len(whole) > len(texts) / 2
    if max_bytes is None:
        assert sorted(documents(whole)) == sorted(texts)
    tally = ReadTally()
    stream = read_pieces(find_source(config), start=Cursor(), tally=tally, max_bytes=max_bytes)
    num_resumed = 0
    for i, piece in enumerate(stream):
        if piece.after is not None:
            so_far = ReadTally(tally.source_bytes, dict(tally.skipped))
            assert read(config, start=piece.after, tally=so_far) == whole[i + 1 :]
            num_resumed += 1
    assert num_resumed >= len(documents(whole))


def test_max_bytes_ends_the_reading(tmp_path: Path, data_config: Config, write_jsonl: WriteJsonl) -> None:
    (tmp_path / "a.txt").write_text("ä" * 50)
    for limit in range(1, 101):
        tally = ReadTally()
        text = "".join(
            str(piece.content) for piece in read(data_config(tmp_path / "a.txt", max_bytes=limit), tally=tally)
        )
        assert text == "ä" * (limit // 2)
        assert tally.source_bytes <= limit
    path = write_jsonl([{"text": "12345678"}] * 10)
    assert len(read(data_config(path, max_bytes=17))) == 3  # the record that crosses the limit is the last one


def test_split_text_cuts_behind_lines() -> None:
    assert list(split_text("aaa\nbbb\nccc", 2)) == ["aaa\n", "bbb\n", "ccc"]
    assert list(split_text("x" * 10, 4)) == ["x" * 8, "xx"]
    assert list(split_text("", 4)) == [""]
    text = random_text(999)
    parts = list(split_text(text, 16))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 32


def test_byte_order_marks_are_no_text(tmp_path: Path, data_config: Config) -> None:
    for name in ("a.txt", "b.py"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfhello")
        assert documents(read(data_config(tmp_path / name))) == ["hello"]
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert documents(read(data_config(tmp_path / "c.jsonl"))) == ["hello"]


def test_source_files_that_are_no_text_are_counted(tmp_path: Path, data_config: Config) -> None:
    (tmp_path / "a.py").write_bytes("x = 'é'".encode("latin-1"))
    (tmp_path / "b.py").write_text("y = 1")
    (tmp_path / "c.py").write_text(" \n")
    with open(tmp_path / "d.py", "wb") as file:
        file.truncate((16 << 20) + 1)
    tally = ReadTally()
    assert documents(read(data_config(tmp_path), tally=tally)) == ["y = 1"]
    assert tally.skipped == {"not UTF-8": 1, "empty": 1, "larger than 16 MiB": 1}
    assert tally.skipped_examples["not UTF-8"] == "a.py"


def test_undecodable_text_names_its_line(tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthree and more\nfo\xffur\nfive\n")
    with pytest.raises(InputError, match=r"a.txt line 4: not UTF-8 text \(byte 25"):
        read(data_config(path))
    path.write_bytes(b"cut in a charact\xc3")
    with pytest.raises(InputError, match=r"a.txt line 1: not UTF-8"):
        read(data_config(path))


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
BROKEN_LINES = [
    ('{"text": "a"', "not a JSON object on one line"),
    ("[1, 2]", "is wanted, got a list"),
    ('"text"', "is wanted, got a string"),
    ('{"body": "a"}', r"neither `text` nor `messages` among its keys \['body'\]"),
    ('{"text": 5}', "`text` must be a string, got a number"),
    ('{"text": null}', "`text` must be a string, got null"),
    ('{"text": "\\ud800"}', "half a surrogate pair"),
    ('{"messages": []}', "non-empty list, got an empty list"),
    ('{"messages": "hi"}', "non-empty list, got a string"),
    ('{"messages": ["hi"]}', "message 0 must be an object"),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"content": "a"}]}',
        "message 1 needs `role` as a string, got nothing",
    ),
    ('{"messages": [{"role": "user"}]}', "message 0 needs `content` as a string, got nothing"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', "message 0: parts of `content` must be of type text"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES)
def test_a_broken_line_is_named(write_jsonl: WriteJsonl, data_config: Config, line: str, reason: str) -> None:
    path = write_jsonl([{"text": "fine"}, "", {"messages": MESSAGES}, line, {"text": "fine"}])
    with pytest.raises(InputError, match=rf"source.jsonl line 4: .*{reason}"):
        read(data_config(path))


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, data_config: Config) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a.jsonl line 2: not UTF-8"):
        read(data_config(path))


def test_parquet_messages_and_faults(tmp_path: Path, data_config: Config) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [MESSAGES, [{**MESSAGES[0], "name": "x"}]]}), path)
    first, second = (piece.content for piece in read(data_config(path)))
    assert first == MESSAGES
    assert second == [{"role": "user", "content": "hi", "name": "x"}]
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(InputError, match=r"a.parquet row 2: `text` must be a string, got null"):
        read(data_config(path))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(InputError, match=r"a.parquet row 1: `text` must be a string, got a number"):
        read(data_config(path))
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(InputError, match=r"a.parquet: neither a `text` nor a `messages` column among \['body'\]"):
        read(data_config(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a.parquet: not a readable Parquet file"):
        read(data_config(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, data_config: Config) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = find_source(data_config(tmp_path / "a.txt"))
    gone = replace(source, files=(replace(source.files[0], path=tmp_path / "gone.txt"),))
    with pytest.raises(InputError, match=r"gone.txt: cannot be read \(No such file"):
        list(read_pieces(gone, start=Cursor(), tally=ReadTally(), max_bytes=None))
