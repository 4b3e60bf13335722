"""Source files to documents, in pieces of bounded size, from any point that was reached before.

A document is a text file, a source file, or one record of JSON or Parquet (records.py). Long texts come in pieces of
about a mebibyte, cut behind a line end where there is one. A piece carries the text around it, so that its tokens are
those of the whole text.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import open_regular, read_regular
from headrace.workers.data.config import SourceFormat
from headrace.workers.data.json_records import count_newlines, read_json_records
from headrace.workers.data.parquet_records import read_parquet_records
from headrace.workers.data.records import Content, Record, read_record, texts_of, wrong
from headrace.workers.data.sources import Source, SourceFile

# CONTEXT: characters (of a file: bytes) around a piece. A tokenizer looks a word or two to both sides, so the context
# grows, up to MAX_CONTEXT, until it holds BREAKS changes between words and white space.
PIECE_BYTES, CONTEXT, MAX_CONTEXT, BREAKS = 1 << 20, 1 << 10, 16 << 20, 4
_BREAK = re.compile(r"\S(?=\s)|\s(?=\S)")
# A "source file" beyond this is generated data.
MAX_SOURCE_FILE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading continues: file number, byte offset in it (text, JSON), records of it that are done."""

    file: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one document.

    Args:
        content: text, the messages of a chat, or a prompt with responses (then it is the whole record).
        starts, ends: first and last piece of its document.
        after: where reading continues after this piece; None if it cannot.
        where: file and line or row, for errors.
        before, behind: the text of the document around this piece.
        variables: of a chat: what its template sees besides the messages (`tools`, `documents`, ...).
    """

    content: Content
    starts: bool
    ends: bool
    after: Cursor | None
    where: str
    variables: dict[str, Any] = field(default_factory=dict)
    before: str = ""
    behind: str = ""


@dataclass
class ReadTally:
    """What was read so far; part of the journal."""

    source_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count an input that is left out, and keep the first of its kind as an example."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.skipped_examples.setdefault(reason, where)


def read_pieces(source: Source, *, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    """Yield the pieces of a source, file by file.

    Args:
        source: the files.
        start: continue here.
        tally: counts what is read and left out; its state belongs to the piece yielded last.
        max_bytes: of UTF-8 text, over the whole source: a text file ends there, and no record begins beyond.

    Raises:
        InputError: an unreadable file, text that is not UTF-8, a broken record; names the file and the line or row.
    """
    read = {
        SourceFormat.text: _read_text,
        SourceFormat.source_tree: _read_source_file,
        SourceFormat.jsonl: _read_json,
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


def split_text(text: str, limit: int = PIECE_BYTES) -> Iterator[str]:
    """Cut a text behind the first line end after every `limit` characters, or at 2 x `limit` where there is none."""
    begin = 0
    while len(text) - begin > limit:
        end = text.find("\n", begin + limit - 1, begin + 2 * limit) + 1 or min(begin + 2 * limit, len(text))
        yield text[begin:end]
        begin = end
    if begin < len(text) or not text:
        yield text[begin:]


def _cut(record: Record, after: Cursor, where: str) -> Iterator[Piece]:
    content = record.content
    if not isinstance(content, str):
        yield Piece(content, True, True, after, where, record.variables)
        return
    end = 0
    for part in split_text(content):
        begin, end = end, end + len(part)
        last = end == len(content)
        before = _context(lambda size, end: content[max(0, end - size) : end], begin, begin, where)
        behind = _context(lambda size, end: content[end : end + size], end, len(content) - end, where)
        yield Piece(part, begin == 0, last, after if last else None, where, {}, before, behind)


def _read_text(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    if file.num_bytes == 0:
        tally.skip("empty", file.name)
        return
    offset = start.offset
    with open_regular(file.path) as stream:
        while offset < file.num_bytes:
            room = PIECE_BYTES if max_bytes is None else min(PIECE_BYTES, max_bytes - tally.source_bytes)
            if room <= 0:
                return
            stream.seek(offset)
            raw = stream.read(room)
            if len(raw) == PIECE_BYTES:
                raw += stream.readline(PIECE_BYTES)
            text, num_bytes = _decode(raw, file.path, offset, final=offset + len(raw) >= file.num_bytes)
            if num_bytes == 0:  # max_bytes ends inside a character, or the file shrank
                return
            tally.source_bytes += num_bytes
            out_of_room = max_bytes is not None and tally.source_bytes > max_bytes - 4  # no whole character may fit
            begins, offset = offset == 0, offset + num_bytes
            ends = offset >= file.num_bytes or out_of_room
            after = Cursor(start.file + 1) if ends else Cursor(start.file, offset)
            around = _around(stream, offset - num_bytes, offset, file.path) if not (begins and ends) else ("", "")
            text = text.removeprefix("\ufeff") if begins else text
            yield Piece(text, begins, ends, after, str(file.path), {}, around[0], "" if ends else around[1])
            if ends:
                return


def _around(stream: BinaryIO, begin: int, end: int, path: Path) -> tuple[str, str]:
    """The text before and behind a range of bytes."""

    def read(size: int, first: int) -> str:
        stream.seek(first)
        return stream.read(size).decode("utf-8", "ignore")

    num_bytes = os.fstat(stream.fileno()).st_size
    before = _context(lambda size, at: read(min(size, at), max(0, at - size)), begin, begin, str(path))
    return before.removeprefix("\ufeff"), _context(read, end, num_bytes - end, str(path))


def _context(take: Callable[[int, int], str], at: int, available: int, where: str) -> str:
    """The text on one side of a piece.

    Args:
        take: the text of this size beside the piece, given the size and `at`.
        at: the border of the piece.
        available: size of all the text on that side.

    Raises:
        InputError: a word is longer than MAX_CONTEXT, so that its tokens cannot be those of the whole text.
    """
    size = CONTEXT
    while True:
        text = take(size, at)
        if size >= available or sum(1 for _ in islice(_BREAK.finditer(text), BREAKS)) == BREAKS:
            return text
        if size >= MAX_CONTEXT:
            raise wrong(
                f"{where}: {MAX_CONTEXT >> 20} MiB with fewer than {BREAKS} changes between words and white space; "
                "put spaces or line ends into such long words"
            )
        size *= 2


def _decode(raw: bytes, path: Path, offset: int, *, final: bool) -> tuple[str, int]:
    """UTF-8 text of the whole characters in `raw` and how many bytes they take."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        line = 1 + count_newlines(path, offset) + raw[: error.start].count(b"\n")
        raise InputError(
            f"{path} line {line}: not UTF-8 text (byte {offset + error.start}: {error.reason}); convert it first, as "
            "with `iconv -t UTF-8`"
        ) from error
    return text, len(raw) - len(decoder.getstate()[0])


def _read_source_file(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    if file.num_bytes > MAX_SOURCE_FILE_BYTES:
        tally.skip(f"larger than {MAX_SOURCE_FILE_BYTES >> 20} MiB", file.name)
        return
    raw = read_regular(file.path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        tally.skip("not UTF-8", file.name)
        return
    if not text.strip():
        tally.skip("empty", file.name)
        return
    tally.source_bytes += len(raw)
    yield from _cut(Record(text.removeprefix("\ufeff")), Cursor(start.file + 1), str(file.path))


def _read_json(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    for value, offset, number, where in read_json_records(file.path, start.offset, start.record):
        record = read_record(value, where)
        yield from _pieces_of(record, Cursor(start.file, offset, number), where, tally)
        if max_bytes is not None and tally.source_bytes >= max_bytes:
            return


def _read_parquet(file: SourceFile, start: Cursor, tally: ReadTally, max_bytes: int | None) -> Iterator[Piece]:
    for values, number in read_parquet_records(file.path, start.record):
        where = f"{file.path} row {number}"
        yield from _pieces_of(read_record(values, where), Cursor(start.file, 0, number), where, tally)
        if max_bytes is not None and tally.source_bytes >= max_bytes:
            return


def _pieces_of(record: Record | None, after: Cursor, where: str, tally: ReadTally) -> Iterator[Piece]:
    """The pieces of one record, counted."""
    if record is None:
        tally.skip("null", where)
        return
    texts = texts_of(record.content)
    try:
        tally.source_bytes += sum(len(text.encode("utf-8")) for text in texts)
    except UnicodeEncodeError as error:
        raise wrong(f"{where}: it holds half a surrogate pair, which is not valid text ({error.reason})") from error
    if not any(texts):
        tally.skip("empty", where)
        return
    yield from _cut(record, after, where)
