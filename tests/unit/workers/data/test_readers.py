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

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data import json_records, parquet_records, readers
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


@pytest.mark.parametrize("kind", ["text", "jsonl", "array", "parquet", "source_tree"])
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
        elif kind == "array":
            monkeypatch.setattr(json_records, "READ_BYTES", 9)
            records = json.dumps([{"text": t} for t in half], indent=part, ensure_ascii=False)
            (tmp_path / f"{name}.json").write_text(records, encoding="utf-8")
        elif kind == "parquet":
            pq.write_table(
                pa.table({"n": list(range(len(half))), "text": half}), tmp_path / f"{name}.parquet", row_group_size=2
            )
        else:
            for i, text in enumerate(half):
                suffix = ".py" if kind == "source_tree" else ".txt"
                (tmp_path / f"{name}{i}{suffix}").write_text(text, encoding="utf-8", newline="")
    config = data_config(tmp_path, format=SourceFormat("jsonl" if kind == "array" else kind), max_bytes=max_bytes)
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
BROKEN_LINES = {
    '{"text": "a"': "not a JSON object on one line",
    "[1, 2]": "an object",
    '"text"': "a string",
    '{"body": "a"}': "body",
    '{"text": 5}': "a number",
    '{"text": "\\ud800"}': "surrogate",
    '{"messages": []}': "an empty list",
    '{"messages": "hi"}': "a string",
    '{"messages": ["hi"]}': "message 0",
    '{"messages": [{"role": "user", "content": "a"}, {"content": "a"}]}': "message 1",
    '{"messages": [{"role": "user"}]}': "message 0",
    '{"messages": [{"role": "user", "content": ["a"]}]}': "of type text",
    '{"messages": [{"role": "user", "content": "a"}], "tools": "[1"}': "tools",
    '{"messages": [{"role": "user", "content": "a"}], "tools": "' + "[" * 9999 + '"}': "nested",
    '{"messages": ' + "[" * 9999: "nested",
    '{"messages": ' + "[" * 99 + "]" * 99 + "}": "deep",
    '{"text": ' + "9" * 9999 + "}": "9999",
    '{"conversations": "hi"}': "a string",
    '{"conversations": [{"from": "robot", "value": "a"}]}': "robot",
    '{"conversations": [{"from": ["human"], "value": "a"}]}': "human",
    '{"conversations": [{"from": "gpt", "value": null}]}': "null",
    '{"conversations": ["a"]}': "message 0",
    '{"instruction": "a"}': "instruction",
    '{"instruction": "a", "output": 1}': "output",
    '{"instruction": "a", "output": "b", "history": [["c"]]}': "history",
}


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_broken_record_is_named(tmp_path: Path, data_config: Config, line: str, form: str) -> None:
    records = ['{"text": "fine"}', "", json.dumps({"messages": MESSAGES}), line, '{"text": "fine"}']
    path = tmp_path / "source.json"
    path.write_text("\n".join(records) if form == "lines" else "[\n" + ",\n".join(filter(None, records)) + "\n]")
    with pytest.raises(InputError, match=r"source.json .*line 4\b", check=has_id(ErrorId.data_wrong)) as caught:
        read(data_config(path))
    if form == "lines" or line.startswith("{"):
        wanted = BROKEN_LINES[line].replace("not a JSON object on one line", "JSON")
        assert wanted in str(caught.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path, data_config: Config) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"a.jsonl line 2: not UTF-8"):
        read(data_config(path))


@pytest.mark.parametrize("read_bytes", [1, 2, 7, 64, 1 << 20])
def test_an_array_is_read_as_json_reads_it(
    tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    monkeypatch.setattr(json_records, "READ_BYTES", read_bytes)
    draw = random.Random(read_bytes)
    path = tmp_path / "a.jsonl"  # the suffix does not tell them apart
    for seed in range(30):
        texts = ['\\"]}{[,' + random_text(draw.randrange(1, 60), seed) + '"\n\\u00e4' for _ in range(draw.randrange(9))]
        values: list[Any] = [{"text": text, "n": [1.5e-7, None, {"a": True}]} for text in texts] + [None] * (seed % 3)
        draw.shuffle(values)
        content = json.dumps(values, ensure_ascii=seed % 2 == 0, indent=seed % 4 or None).encode()
        path.write_bytes((b"\xef\xbb\xbf" if seed % 5 == 0 else b"") + b" \r\n" + content + b"\n ")
        tally = ReadTally()
        assert documents(read(data_config(path), tally=tally)) == [v["text"] for v in json.loads(content) if v]
        assert tally.skipped.get("null", 0) == seed % 3


def test_an_array_that_is_cut_or_damaged_is_named(
    tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "READ_BYTES", 16)
    path, content = tmp_path / "a.json", '[{"text": "ä\\u00e4"},\n {"text": "b", "n": [-1.5, true]}]'.encode()
    path.write_bytes(content)
    assert documents(read(data_config(path))) == ["ää", "b"]
    damaged = [content[:end] for end in range(1, len(content))]
    damaged += [content + b" 1", content[:-1] + b",]", content.replace(b"},", b"}"), b"[,{}]", b"[1]", b'["a"]']
    for raw in damaged:
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"a.json .*line [12]\b", check=has_id(ErrorId.data_wrong)):
            read(data_config(path))


def test_a_record_has_a_limit(tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_records, "READ_BYTES", 100)
    path = tmp_path / "a.json"
    for start, end in (("", ""), ("[", "]")):
        path.write_text(start + json.dumps({"text": "x" * 900}) + end)
        assert documents(read(data_config(path))) == ["x" * 900]
        path.write_text(start + json.dumps({"text": "x" * 9000}) + end)
        with pytest.raises(InputError, match="split", check=has_id(ErrorId.data_wrong)):
            read(data_config(path))


SHAREGPT = {
    "system": "short",
    "conversations": [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "ho"},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "five"},
    ],
    "tools": "",
}
ALPACA = {"instruction": "add", "input": "1 2", "output": "3", "history": [["hi", "ho"]], "system": None}
AS_MESSAGES: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "sharegpt": (
        SHAREGPT,
        [
            {"role": "system", "content": "short"},
            *MESSAGES,
            {"role": "tool", "content": "5"},
            {"role": "assistant", "content": "five"},
        ],
    ),
    "messages called conversations": ({"conversations": MESSAGES}, MESSAGES),
    "alpaca": (
        ALPACA,
        [*MESSAGES, {"role": "user", "content": "add\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "alpaca without input": (
        {"instruction": "hi", "input": "", "output": "ho", "text": "Below is an instruction"},
        MESSAGES,
    ),
    "text that is called instruction": ({"instruction": "hi", "text": "ho"}, []),
}


@pytest.mark.parametrize("case", AS_MESSAGES)
def test_chats_of_other_forms(case: str, tmp_path: Path, data_config: Config, write_jsonl: WriteJsonl) -> None:
    record, messages = AS_MESSAGES[case]
    expected = [messages or "ho"] * 2
    assert documents(read(data_config(write_jsonl([record, record])))) == expected
    (tmp_path / "a.json").write_text(json.dumps([record, record]))
    assert documents(read(data_config(tmp_path / "a.json"))) == expected
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    assert documents(read(data_config(tmp_path / "a.parquet"))) == expected


@pytest.mark.parametrize("key", ["text", "messages", "conversations", "instruction"])
def test_null_rows_are_skipped_and_counted(tmp_path: Path, data_config: Config, key: str) -> None:
    good = {"text": "a", "messages": MESSAGES, "conversations": SHAREGPT["conversations"], "instruction": "a"}[key]
    rest = {"output": "b"} if key == "instruction" else {}
    rows = [{key: None, **rest}, {key: good, **rest}, {key: None, **rest}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(["null", *map(json.dumps, rows[:2])]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.json", "b.jsonl", "c.parquet"):
        tally = ReadTally()
        assert len(documents(read(data_config(tmp_path / name), tally=tally))) == 1
        assert tally.skipped == {"null": 2}
        assert name in tally.skipped_examples["null"]


def test_a_column_of_one_large_value_is_read_in_small_batches(
    tmp_path: Path, data_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 100_000] * 2000}), path)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(parquet_records, "_BATCH_BYTES", 400_000)
    sizes = []
    unbounded = pq.ParquetFile.iter_batches

    def iter_batches(table: Any, rows: int, **options: Any) -> Any:
        for batch in unbounded(table, rows, **options):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert len(read(data_config(path))) == 2000
    assert max(sizes) < 500_000


def test_parquet_messages_and_faults(tmp_path: Path, data_config: Config) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [MESSAGES, [{**MESSAGES[0], "name": "x"}]]}), path)
    first, second = (piece.content for piece in read(data_config(path)))
    assert first == MESSAGES
    assert second == [{"role": "user", "content": "hi", "name": "x"}]
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(InputError, match=r"a.parquet row 1: .*a number", check=has_id(ErrorId.data_wrong)):
        read(data_config(path))
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(InputError, match=r"a.parquet: .*\['body'\]", check=has_id(ErrorId.data_wrong)):
        read(data_config(path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a.parquet: ", check=has_id(ErrorId.data_wrong)):
        read(data_config(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, data_config: Config) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = find_source(data_config(tmp_path / "a.txt"))
    gone = replace(source, files=(replace(source.files[0], path=tmp_path / "gone.txt"),))
    with pytest.raises(InputError, match=r"gone.txt: cannot be read \(No such file"):
        list(read_pieces(gone, start=Cursor(), tally=ReadTally(), max_bytes=None))
