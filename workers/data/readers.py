"""Source files to documents, in pieces of bounded size, from any point that was reached before.

A document is a text file, a source file, or one record (`text` or chat `messages`) of JSONL or Parquet. Long texts
come in pieces of about a mebibyte, cut behind a line end where there is one; each piece is tokenized by itself.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.workers.data.config import SourceFormat
from headrace.workers.data.sources import Source, SourceFile

PIECE_BYTES = 1 << 20
# A "source file" beyond this is generated data.
MAX_SOURCE_FILE_BYTES = 16 << 20
_PARQUET_BATCH_ROWS = 256

_LINE_END = re.compile(r"\n(?=\S)")

# What a record of a chat may hold besides `messages`, as transformers' apply_chat_template takes it.
CHAT_VARIABLES = ("tools", "documents", "chat_template_kwargs")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading goes on: file number, byte offset in it (text, JSONL), records of it that are done."""

    file: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one document.

    Args:
        content: text, or the messages of a chat (then it is the whole document).
        starts, ends: first and last piece of its document.
        after: where reading goes on after this piece; None where it cannot.
        where: file and line or row, for errors.
        variables: of a chat: what its template sees besides the messages (`tools`, `documents`, ...).
    """

    content: str | Messages
    starts: bool
    ends: bool
    after: Cursor | None
    where: str
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass
class ReadTally:
    """What was read so far; part of the journal."""

    source_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count an input that is left out, and remember the first of its kind."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.skipped_examples.setdefault(reason, where)


def read_pieces(source: Source, *, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    """Yield the pieces of a source, file by file.

    Args:
        source: the files.
        start: go on here.
        tally: counts what is read and left out; its state belongs to the piece yielded last.
        max_bytes: of UTF-8 text, over the whole source: a text file ends there, and no record begins beyond.

    Raises:
        InputError: an unreadable file, text that is not UTF-8, a broken record; names the file and the line or row.
    """
    read = {
        SourceFormat.text: _read_text,
        SourceFormat.source_tree: _read_source_file,
        SourceFormat.jsonl: _read_jsonl,
        SourceFormat.parquet: _read_parquet,
    }[source.format]
    for number in range(start.file, len(source.files)):
        if max_bytes is not None and tally.source_bytes >= max_bytes:
            return
        here = start if number == start.file else Cursor(file=number)
        file = source.files[number]
        try:
            yield from read(file, here, tally, max_bytes)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read ({error.strerror or error})") from error


def texts_of(content: str | Messages) -> list[str]:
    """The text, or the texts of all messages."""
    return [content] if isinstance(content, str) else [text for message in content for text in _strings(message)]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a message, without its keys and its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in ("role", "type"):
                yield from _strings(part)


def split_text(text: str, limit: int = PIECE_BYTES) -> Iterator[str]:
    """Cut a text behind the first line end after every `limit` characters, or at 2 x `limit` where there is none."""
    begin = 0
    while len(text) - begin > limit:
        # White space is tokenized together, so a text is not cut inside it.
        line_end = _LINE_END.search(text, begin + limit, min(begin + 2 * limit, len(text)))
        end = line_end.end() if line_end else min(begin + 2 * limit, len(text))
        yield text[begin:end]
        begin = end
    if begin < len(text) or not text:
        yield text[begin:]


def _pieces_of_record(
    content: str | Messages, after: Cursor, where: str, variables: dict[str, Any] | None = None
) -> Iterator[Piece]:
    parts: list[str | Messages] = [content] if isinstance(content, list) else [*split_text(content)]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        yield Piece(part, i == 0, last, after if last else None, where, variables or {})


def _read_text(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    if file.num_bytes == 0:
        tally.skip("empty", file.name)
        return
    offset = start.offset
    with open(file.path, "rb") as stream:
        while offset < file.num_bytes:
            room = PIECE_BYTES if max_bytes is None else min(PIECE_BYTES, max_bytes - tally.source_bytes)
            if room <= 0:
                return
            stream.seek(offset)
            raw = stream.read(room)
            if len(raw) == PIECE_BYTES:
                raw += stream.readline(PIECE_BYTES)
                # White space is tokenized together, so a text is not cut inside it.
                while raw.endswith(b"\n") and len(raw) < 2 * PIECE_BYTES and stream.peek(1)[:1].isspace():
                    raw += stream.readline(2 * PIECE_BYTES - len(raw))
            text, num_bytes = _decode(raw, file.path, offset, final=offset + len(raw) >= file.num_bytes)
            if num_bytes == 0:  # max_bytes ends inside a character, or the file shrank
                return
            tally.source_bytes += num_bytes
            out_of_room = max_bytes is not None and tally.source_bytes > max_bytes - 4  # no whole character may fit
            begins, offset = offset == 0, offset + num_bytes
            ends = offset >= file.num_bytes or out_of_room
            after = Cursor(start.file + 1) if ends else Cursor(start.file, offset)
            yield Piece(text.removeprefix("\ufeff") if begins else text, begins, ends, after, str(file.path))
            if ends:
                return


def _decode(raw: bytes, path: Path, offset: int, *, final: bool) -> tuple[str, int]:
    """UTF-8 text of the whole characters in `raw` and how many bytes they take."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        line = 1 + _count_newlines(path, offset) + raw[: error.start].count(b"\n")
        raise InputError(
            f"{path} line {line}: not UTF-8 text (byte {offset + error.start}: {error.reason}); convert it first, as "
            "with `iconv -t UTF-8`"
        ) from error
    return text, len(raw) - len(decoder.getstate()[0])


def _count_newlines(path: Path, end: int) -> int:
    num_newlines = 0
    with open(path, "rb") as stream:
        while (left := end - stream.tell()) > 0 and (block := stream.read(min(left, 1 << 20))):
            num_newlines += block.count(b"\n")
    return num_newlines


def _read_source_file(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    if file.num_bytes > MAX_SOURCE_FILE_BYTES:
        tally.skip(f"larger than {MAX_SOURCE_FILE_BYTES >> 20} MiB", file.name)
        return
    raw = file.path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        tally.skip("not UTF-8", file.name)
        return
    if not text.strip():
        tally.skip("empty", file.name)
        return
    tally.source_bytes += len(raw)
    yield from _pieces_of_record(text.removeprefix("\ufeff"), Cursor(start.file + 1), str(file.path))


def _read_jsonl(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    with open(file.path, "rb") as stream:
        stream.seek(start.offset)
        line_number, offset = start.record, start.offset
        while line := stream.readline():
            line_number, offset = line_number + 1, offset + len(line)
            if not line.strip():
                continue
            where = f"{file.path} line {line_number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: not UTF-8 text ({error.reason})") from error
            except ValueError as error:
                raise InputError(f"{where}: not a JSON object on one line ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: a JSON object with `text` or `messages` is wanted, got {_kind(record)}")
            name = "messages" if "messages" in record else "text"
            if name not in record:
                raise InputError(f"{where}: neither `text` nor `messages` among its keys {sorted(record)[:8]}")
            yield from _record(record, name, Cursor(start.file, offset, line_number), where, tally)
            if max_bytes is not None and tally.source_bytes >= max_bytes:
                return


def _read_parquet(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            name = "messages" if "messages" in names else "text"
            if name not in names:
                raise InputError(f"{file.path}: neither a `text` nor a `messages` column among {names[:8]}")
            wanted = [name] if name == "text" else [name, *(key for key in CHAT_VARIABLES if key in names)]
            row = 0
            for group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(group).num_rows
                if row + num_rows <= start.record:
                    row += num_rows
                    continue
                for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=wanted):
                    for record in batch.to_pylist():
                        row += 1
                        if row <= start.record:
                            continue
                        record = _without_nulls(record) if name == "messages" else record
                        yield from _record(record, name, Cursor(start.file, 0, row), f"{file.path} row {row}", tally)
                        if max_bytes is not None and tally.source_bytes >= max_bytes:
                            return
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.path}: not a readable Parquet file ({error})") from error


def _without_nulls(value: Any) -> Any:
    """A value of Parquet without the keys that only the column's type puts there."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _chat_variables(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What the template sees besides the messages."""
    variables: dict[str, Any] = {}
    for key in CHAT_VARIABLES:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, str):  # Parquet files often hold them as JSON text
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"{where}: `{key}` is text that is not JSON ({error})") from error
        if key == "chat_template_kwargs":
            if not isinstance(value, dict):
                raise InputError(f"{where}: `{key}` must be an object, got {_kind(value)}")
            reserved = {"messages", "add_generation_prompt", "continue_final_message"} & set(value)
            if reserved:
                raise InputError(f"{where}: `{key}` may not set {sorted(reserved)}")
            variables |= value
        elif not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise InputError(f"{where}: `{key}` must be a list of objects, got {_kind(value)}")
        else:
            variables[key] = value
    return variables


def _record(record: dict[str, Any], name: str, after: Cursor, where: str, tally: ReadTally) -> Iterator[Piece]:
    """The pieces of one `text` or `messages` record, checked and counted."""
    value = record.get(name)
    content: str | Messages
    if name == "messages":
        content = check_messages(value, where)
    elif isinstance(value, str):
        content = value
    else:
        raise InputError(f"{where}: `text` must be a string, got {_kind(value)}")
    texts = texts_of(content)
    try:
        tally.source_bytes += sum(len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: `{name}` holds half a surrogate pair, which is not text ({error.reason})"
        ) from error
    if not any(texts):
        tally.skip("empty", where)
        return
    variables = _chat_variables(record, where) if name == "messages" else {}
    yield from _pieces_of_record(content, after, where, variables)


def check_messages(value: Any, where: str) -> Messages:
    """Chat messages as plain dicts.

    Raises:
        InputError: not a non-empty list of objects with a `role`; `content` is a string, a list of parts, or null.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: `messages` must be a non-empty list, got {_kind(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(f"{where}: message {i} must be an object with `role` and `content`, got {_kind(message)}")
        if not isinstance(message.get("role"), str):
            got = _kind(message["role"]) if "role" in message else "nothing"
            raise InputError(f"{where}: message {i} needs `role` as a string, got {got}")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        may_be_null = content is None and message["role"] == "assistant"  # a turn of tool calls only
        if not may_be_null and not isinstance(content, str | list):
            got = _kind(content) if "content" in message else "nothing"
            raise InputError(f"{where}: message {i} needs `content` as a string, got {got}")
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise InputError(f"{where}: message {i}: parts of `content` must be of type text, with a `text`")
    # A key that is null looks missing to a template, as in transformers.
    return [{key: part for key, part in message.items() if part is not None} for message in value]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
