"""Sizes of the pages of a Parquet file, read before pyarrow allocates memory for them.

pyarrow allocates what a page header states, and it ends the process where the metadata of a column is damaged. So the
footer and the page headers are read here. Both are structs of Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, BinaryIO

from headrace.workers.data.records import wrong

# A page is decompressed whole. Writers aim at 1 MiB; a page that holds one long value is longer.
MAX_PAGE_BYTES = 1 << 30
# Of a list's elements in one row group, for all may stand in one row. An element takes 8 bytes besides its value.
MAX_LIST_VALUES = 1 << 28
# Of a list's elements that pyarrow writes out although the file holds what they have in common once.
_MAX_REPEATED_BYTES = 1 << 32
_MAX_DEPTH, _HEADER_BYTES = 16, (1 << 12, 1 << 24)
_BYTE_ARRAY, _DELTAS, _DELTA_BYTE_ARRAY, _DICTIONARY_PAGE = 6, {5, 6, 7}, 7, 2
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12


def footer_of(stream: BinaryIO) -> dict[int, Any]:
    """The FileMetaData of a Parquet file: fields by their numbers.

    Raises:
        ValueError: it is not one. OSError: it cannot be read.
    """
    num_bytes = stream.seek(-8, 2)
    length = int.from_bytes(stream.read(4), "little")
    if length > num_bytes:
        raise ValueError(f"the footer states {length} bytes, the file has {num_bytes}")
    stream.seek(num_bytes - length)
    return _Reader(stream.read(length)).struct()


def nested_texts(footer: dict[int, Any]) -> list[str]:
    """Paths of the columns of texts inside lists and structs that pyarrow can read as dictionaries: not of deltas."""
    found: dict[str, bool] = {}
    for group in _field(footer, 4, list):
        for chunk in _field(group, 1, list):
            about = _field(chunk, 3, dict)
            path = b".".join(_field(about, 3, list)).decode("utf-8", "replace")
            if "." in path and about.get(1) == _BYTE_ARRAY:
                found[path] = found.get(path, True) and not _DELTAS & set(_field(about, 2, list))
    return [path for path, is_readable in found.items() if is_readable]


def largest_pages(stream: BinaryIO, footer: dict[int, Any], group: int, names: Collection[str], where: str) -> int:
    """Bytes without compression of the largest page of each column, added up. No value is larger than its page.

    Args:
        group: number of the row group.
        names: top-level columns that are read.
        where: the file, for errors.

    Raises:
        InputError: a page does not lie in the file, or is larger than MAX_PAGE_BYTES, or lists hold more than
            MAX_LIST_VALUES, or values that share parts may take too much memory; names column and size.
        ValueError: damaged metadata. OSError: it cannot be read.
    """
    total = 0
    for chunk in _field(_field(footer, 4, list)[group], 1, list):
        about = _field(chunk, 3, dict)
        path = [name.decode("utf-8", "replace") for name in _field(about, 3, list)]
        if path[0] in names:
            total += _largest_page(stream, about, f"{where}: column {'.'.join(path)} of row group {group}")
    return total


def _largest_page(stream: BinaryIO, about: dict[int, Any], where: str) -> int:
    starts = [about[number] for number in (9, 11) if isinstance(about.get(number), int) and about[number] > 0]
    position, num_bytes = min(starts, default=0), stream.seek(0, 2)
    num_values = left = _field(about, 5, int)
    largest, nested = 0, len(_field(about, 3, list)) > 1
    unfolds, has_deltas = False, bool(_DELTAS & set(_field(about, 2, list)))
    if nested and num_values > MAX_LIST_VALUES:
        raise wrong(
            f"{where}: lists of {num_values} values, at most {MAX_LIST_VALUES} are read; write the file again "
            "with smaller row groups (pyarrow: row_group_size)"
        )
    while left > 0:
        stream.seek(position)
        header, length = _header(stream)
        size, stored = _field(header, 2, int), _field(header, 3, int)
        position += length + stored
        if stored < 0 or position > num_bytes:
            raise wrong(f"{where}: a page of {stored} bytes ends behind the file's {num_bytes}; the file is damaged")
        if size < 0 or (_field(about, 4, int) == 0 and size != stored):
            raise wrong(f"{where}: a page states {size} bytes and has {stored}; the file is damaged")
        if size > MAX_PAGE_BYTES:
            raise wrong(
                f"{where}: a page of {size} bytes, at most {MAX_PAGE_BYTES} are read; write the file again with "
                "smaller pages (pyarrow: data_page_size, dictionary_pagesize_limit) or split its longest values"
            )
        largest = max(largest, size)
        data = header.get(5) or header.get(8)  # version 1 or 2 of data pages; others hold no values of rows
        if isinstance(data, dict):
            left -= _field(data, 1, int)
            unfolds |= data.get(2 if 5 in header else 4) == _DELTA_BYTE_ARRAY
        unfolds |= has_deltas and header.get(1) == _DICTIONARY_PAGE
    if nested and unfolds and num_values * largest > _MAX_REPEATED_BYTES:
        raise wrong(
            f"{where}: {num_values} values that share parts of a page of {largest} bytes can take more than "
            f"{_MAX_REPEATED_BYTES} bytes; write the file again with the default encoding"
        )
    return largest


def _header(stream: BinaryIO) -> tuple[dict[int, Any], int]:
    """A PageHeader and its length; statistics can make it long."""
    begin = stream.tell()
    for size in _HEADER_BYTES:
        stream.seek(begin)
        reader = _Reader(stream.read(size))
        try:
            return reader.struct(), reader.position
        except IndexError:
            continue
    raise ValueError(f"no page header at byte {begin}")


def _field(struct: Any, number: int, kind: type) -> Any:
    value = struct.get(number) if isinstance(struct, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"field {number} of the metadata is missing")
    return value


class _Reader:
    """Values of Thrift's compact protocol. Raises IndexError behind the end of the bytes, ValueError for wrong ones."""

    def __init__(self, content: bytes) -> None:
        self._content, self.position = content, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a struct by their numbers."""
        if depth > _MAX_DEPTH:
            raise ValueError("its metadata is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _byte(self) -> int:
        self.position += 1
        return self._content[self.position - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of its metadata is too long")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind < _DOUBLE:
            return self._signed()
        if kind in (_DOUBLE, _BINARY):
            length = 8 if kind == _DOUBLE else self._unsigned()
            self.position += length
            if self.position > len(self._content):
                raise IndexError
            return self._content[self.position - length : self.position]
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"type {kind} in its metadata")
