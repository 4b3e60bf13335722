"""Records of a JSON file, one at a time, from any place that was reached before: one a line, or all in one array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import open_regular, parse_json
from headrace.workers.data.records import wrong

# More than any document that fits a model's context; as values it takes up to some twenty times that.
MAX_RECORD_BYTES = 64 << 20
READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = "\ufeff"
# An error this close to the end of what was read may be a word or an escape that goes on behind it.
_LONGEST_WORD = 16


class JsonRecord(NamedTuple):
    """A value; where reading goes on behind it: a byte offset, and how many lines or elements were read; its place."""

    value: Any
    offset: int
    number: int
    where: str


def read_json_records(path: Path, offset: int, number: int) -> Iterator[JsonRecord]:
    """The records of a file behind those that were read before.

    Args:
        offset, number: of the record read last; 0 and 0 at the start.

    Raises:
        OSError: it cannot be read. InputError: it is not JSON, or a record is too long or nested too deeply; names the
            file and the line.
    """
    with open_regular(path) as stream:
        start = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.startswith(b"["):
            yield from _Array(path, stream).read(offset, number)
        else:
            yield from _read_lines(path, stream, offset, number)


def count_newlines(path: Path, end: int) -> int:
    """Line ends in the first `end` bytes of a file."""
    num_newlines = 0
    with open_regular(path) as stream:
        while (left := end - stream.tell()) > 0 and (block := stream.read(min(left, 1 << 20))):
            num_newlines += block.count(b"\n")
    return num_newlines


def _read_lines(path: Path, stream: BinaryIO, offset: int, number: int) -> Iterator[JsonRecord]:
    """`number` counts lines."""
    stream.seek(offset)
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number, offset = number + 1, offset + len(line)
        where = f"{path} line {number}"
        if len(line) > MAX_RECORD_BYTES:
            raise _too_long(where)
        if not line.strip():
            continue
        try:
            value = parse_json(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise wrong(f"{where}: not UTF-8 text ({error.reason})") from error
        except ValueError as error:
            raise wrong(
                f"{where}: not a JSON object on one line ({error}); give one object per line, or one array of objects"
            ) from error
        yield JsonRecord(value, offset, number, where)


def _too_long(where: str) -> InputError:
    return wrong(f"{where}: a record of more than {MAX_RECORD_BYTES >> 20} MiB; split it")


class _Array:
    """The elements of one array. About one of them, or READ_BYTES, is in memory."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._num_read = 0
        # Text from some place of the file on; `_at` is the place in it that was reached, and in the file `_offset`.
        self._text, self._at = "", 0
        self._offset, self._line = 0, 1

    def read(self, offset: int, number: int) -> Iterator[JsonRecord]:
        """`number` counts elements."""
        self._stream.seek(offset)
        self._num_read = self._offset = offset
        if number == 0:
            if self._next() == _BYTE_ORDER_MARK:
                self._pass(self._at + 1)
            self._take("[")
        else:
            self._line += count_newlines(self._path, offset)
        while True:
            if self._next() == "]":
                self._take("]")
                if self._next():
                    raise self._wrong("something follows the array")
                return
            if number > 0:
                self._take(",")
            number += 1
            value, where = self._element(number)
            yield JsonRecord(value, self._offset, number, where)

    def _element(self, number: int) -> tuple[Any, str]:
        if self._next() not in ("{", "n"):
            raise self._wrong("an object is expected here")
        where = f"{self._path} record {number} (line {self._line})"
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                self._pass(end)
                return value, where
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._text) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if cut and len(self._text) - self._at > MAX_RECORD_BYTES:
                    raise _too_long(where) from None
                if not (cut and self._more()):
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    raise wrong(
                        f"{where}: not JSON ({error.msg} at line {line}); the array may be incomplete"
                    ) from error
            except RecursionError:
                raise wrong(f"{where}: nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise wrong(f"{where}: {error}") from error

    def _next(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._pass(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self, wanted: str) -> None:
        if (got := self._next()) != wanted:
            raise self._wrong(f"{wanted!r} is wanted, got {got!r}" if got else f"the file ends before its {wanted!r}")
        self._pass(self._at + 1)

    def _pass(self, end: int) -> None:
        """Go on to a place in the text."""
        passed = self._text[self._at : end]
        self._offset += len(passed.encode())
        self._line += passed.count("\n")
        self._at = end

    def _more(self) -> bool:
        """Read on; twice as far each time that an element does not end. False at the end of the file."""
        raw = self._stream.read(max(READ_BYTES, len(self._text) - self._at))
        try:
            text = self._utf8.decode(raw, not raw)
        except UnicodeDecodeError as error:
            line = 1 + count_newlines(self._path, self._num_read + error.start)
            raise wrong(f"{self._path} line {line}: not UTF-8 text ({error.reason})") from error
        self._num_read += len(raw)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(raw)

    def _wrong(self, problem: str) -> InputError:
        return wrong(f"{self._path} line {self._line}: {problem}; give an array of objects, or one object per line")
