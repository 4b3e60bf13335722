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
from dataclasses import dataclass
from enum import StrEnum

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
    """Scores that one call computes: rows of the batch, queries and keys by their place in the row, [begin, end)."""

    rows: Span
    queries: Span
    keys: Span
    kind: PieceKind

    @property
    def smallest_side(self) -> int:
        """The smaller of its number of queries and of keys."""
        return min(self.queries[1] - self.queries[0], self.keys[1] - self.keys[0])


def block_bounds(num_keys: int, block_len: int) -> tuple[Span, ...]:
    """[begin, end) of every block of `block_len` keys; the last one may be shorter.

    On CUDA a multiple of 128 keeps the kernels whole and their shapes few.

    Raises:
        ValueError: fewer than one key, or a block length below 1.
    """
    if num_keys < 1 or block_len < 1:
        raise ValueError(f"block_bounds: num_keys={num_keys}, block_len={block_len}: both at least 1")
    return tuple((begin, min(begin + block_len, num_keys)) for begin in range(0, num_keys, block_len))


def documents_by_row(packing: Packing, batch_size: int, num_keys: int) -> tuple[tuple[Span, ...], ...]:
    """[begin, end) of every document in its row.

    Raises:
        ValueError: documents that do not fill the rows.
    """
    packing.check(batch_size, num_keys)
    rows: list[list[Span]] = [[] for _ in range(batch_size)]
    place = 0
    for length in packing.lengths:
        row, begin = divmod(place, num_keys)
        rows[row].append((begin, begin + length))
        place += length
    return tuple(tuple(row) for row in rows)


def block_pieces(
    block: Span,
    queries: Span,
    *,
    batch_size: int,
    documents: tuple[tuple[Span, ...], ...] | None = None,
    window: int | None = None,
) -> tuple[Piece, ...]:
    """The pieces of one block, disjoint, together all scores that are seen; none where no query sees the block.

    Args:
        block: its keys. queries: of the call, at any place of the row.
        documents: of every row, from `documents_by_row`; None where a row is one document.
        window: keys that a query sees, itself included; None means all before it.
    """
    if documents is None:
        return tuple(_pieces((0, batch_size), block, queries, window))
    found: list[Piece] = []
    for row, spans in enumerate(documents):
        reached = bisect.bisect_right(spans, block[0], key=lambda span: span[1])
        for span in itertools.takewhile(lambda span: span[0] < block[1], spans[reached:]):
            found += _pieces((row, row + 1), _overlap(block, span), _overlap(queries, span), window)
    return tuple(found)


def _overlap(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])


def _pieces(rows: Span, keys: Span, queries: Span, window: int | None) -> Iterator[Piece]:
    """Of keys and queries of one document."""
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
