"""How the scores of causal attention are cut along the keys: pure integers, the same wherever the blocks are stored.

A block of keys meets the queries in at most three kinds of piece:

    full    every query of the piece sees every key: a stock operator without a mask
    causal  a square on the diagonal: a stock operator with its causal mask, which is the same for every alignment there
    masked  at the far edge of a sliding window: at most TILE x TILE scores, a plain torch tile with a mask

Prefix blocks are full, however the operator aligns "causal" when there are fewer queries than keys.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from headrace.kernels.packing import Packing

Span = tuple[int, int]
# Side of a masked tile, in tokens.
TILE = 512


class PieceKind(StrEnum):
    """See the module's docstring."""

    full = "full"
    causal = "causal"
    masked = "masked"


@dataclass(frozen=True)
class Piece:
    """Scores that one call computes: rows of the batch, queries and keys by their place in the row, [begin, end).

    `skip`: see Reading.
    """

    rows: Span
    queries: Span
    keys: Span
    kind: PieceKind
    skip: int = 0

    @property
    def smallest_side(self) -> int:
        """The smaller of its number of queries and of keys."""
        return min(self.queries[1] - self.queries[0], self.keys[1] - self.keys[0])


def check_blocks(num_keys: int, block_len: int) -> None:
    """Raise ValueError where there is not one key, or a block length below 1."""
    if num_keys < 1 or block_len < 1:
        raise ValueError(f"block_bounds: num_keys={num_keys}, block_len={block_len}: both at least 1")


def block_bounds(num_keys: int, block_len: int) -> tuple[Span, ...]:
    """[begin, end) of every block of `block_len` keys; the last one may be shorter.

    On CUDA a multiple of 128 keeps the kernels whole and their shapes few.

    Raises:
        ValueError: fewer than one key, or a block length below 1.
    """
    check_blocks(num_keys, block_len)
    return tuple((begin, min(begin + block_len, num_keys)) for begin in range(0, num_keys, block_len))


class Reading(NamedTuple):
    """Keys of one document of a row, and queries that see them up to themselves; each by place, [begin, end).

    Args:
        queries: of the document, and of those that continue it.
        skip: tokens between them that the queries do not see. It counts only under a window.
    """

    keys: Span
    queries: Span
    skip: int = 0


def readings_by_row(
    packing: Packing, batch_size: int, num_keys: int, window: int | None = None
) -> tuple[tuple[Reading, ...], ...]:
    """Who reads the keys of the documents of every row, in the order of the documents.

    Raises:
        ValueError: documents that do not fill the rows.
    """
    packing.check(batch_size, num_keys)
    found: list[list[Reading]] = []
    place = 0
    for document, length in enumerate(packing.lengths):
        begin = place % num_keys
        own = (begin, begin + length)
        found.append([Reading(own, own)])
        for ancestor in packing.ancestors(document):
            last = found[ancestor][-1]
            distance = packing.prefixes[document] - packing.prefixes[ancestor]
            skip = 0 if window is None else begin - last.keys[0] - distance
            if skip == last.skip:
                found[ancestor][-1] = last._replace(queries=(last.queries[0], own[1]))
            else:
                found[ancestor].append(Reading(last.keys, own, skip))
        place += length
    rows: list[list[Reading]] = [[] for _ in range(batch_size)]
    place = 0
    for readings, length in zip(found, packing.lengths, strict=True):
        rows[place // num_keys] += readings
        place += length
    return tuple(tuple(row) for row in rows)


def block_pieces(
    block: Span,
    queries: Span,
    *,
    batch_size: int,
    readings: tuple[tuple[Reading, ...], ...] | None = None,
    window: int | None = None,
) -> tuple[Piece, ...]:
    """The pieces of one block, disjoint, together all scores that are seen; none where no query sees the block.

    Args:
        block: its keys. queries: of the call, at any place of the row.
        readings: of every row, from `readings_by_row`; None where a row is one document.
        window: keys that a query sees, itself included; None means all before it.
    """
    if readings is None:
        return tuple(_pieces((0, batch_size), block, queries, window))
    found: list[Piece] = []
    for row, of_row in enumerate(readings):
        reached = bisect.bisect_right(of_row, block[0], key=lambda reading: reading.keys[1])
        for keys, readers, skip in itertools.takewhile(lambda reading: reading.keys[0] < block[1], of_row[reached:]):
            # As if the queries stood right behind what they see.
            moved = _moved(_overlap(queries, readers), -skip)
            for piece in _pieces((row, row + 1), _overlap(block, keys), moved, window):
                found.append(replace(piece, queries=_moved(piece.queries, skip), skip=skip) if skip else piece)
    return tuple(found)


def _overlap(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _pieces(rows: Span, keys: Span, queries: Span, window: int | None) -> Iterator[Piece]:
    """Of keys and of queries that see them; places are positions."""
    first, last = max(queries[0], keys[0]), queries[1]
    begin, end = keys[0], min(keys[1], last)
    if window is not None:
        begin, last = max(begin, first - window + 1), min(last, end - 1 + window)
    if begin >= end or first >= last:
        return
    if last - first == 1:
        # One query sees all of them: its own key needs no square of its own.
        yield Piece(rows, (first, last), (begin, end), PieceKind.full)
        return
    if begin < first:
        yield from _rectangle(rows, (begin, min(end, first)), (first, last), window)
        begin = first
    side = end - begin if window is None else max(window, TILE)
    while begin < end:
        stop = min(begin + side, end)
        kind = PieceKind.causal if window is None or stop - begin <= window else PieceKind.masked
        yield Piece(rows, (begin, stop), (begin, stop), kind)
        beyond = last if window is None else min(last, stop - 1 + window)
        if stop < beyond:
            yield from _rectangle(rows, (begin, stop), (stop, beyond), window)
        begin = stop


def _rectangle(rows: Span, keys: Span, queries: Span, window: int | None) -> Iterator[Piece]:
    """Keys that lie before every query."""
    if window is None:
        yield Piece(rows, queries, keys, PieceKind.full)
        return
    (begin, end), (first, last) = keys, queries
    edge = min(last, begin + window)
    if first < edge:
        yield Piece(rows, (first, edge), keys, PieceKind.full)
    for start in range(max(first, begin + window), last, TILE):
        stop = min(start + TILE, last)
        # From `whole` on every query of the tile sees the keys; the first key that its first query sees is `near`.
        whole, near = min(end, max(begin, stop - window)), max(begin, start - window + 1)
        if near < whole:
            yield Piece(rows, (start, stop), (near, whole), PieceKind.masked)
        if whole < end:
            yield Piece(rows, (start, stop), (whole, end), PieceKind.full)
