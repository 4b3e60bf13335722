"""Which pieces of scores the queries of one ring rank make with the keys of another. No collectives, no sums."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.kernels.attention.cut import Piece, Reading, block_pieces, readings_by_row
from headrace.workers.parallel.context import SplitPacking
from headrace.workers.parallel.row_cut import Span


@dataclass(frozen=True)
class Chunk:
    """Tokens of a rank that stand side by side in their row.

    Args:
        rows: of the batch. at: their place in the rank's tensor. span: their place in the row.
    """

    rows: Span
    at: int
    span: Span

    @property
    def here(self) -> tuple[slice, slice]:
        """Of a tensor (B, n, ...): these tokens."""
        return slice(*self.rows), slice(self.at, self.at + self.span[1] - self.span[0])


@dataclass(frozen=True)
class Meeting:
    """Queries that see some of the keys.

    Args:
        query: number of the query chunk.
        pieces: of the scores; rows count from the chunk's first one.
    """

    query: int
    keys: Chunk
    pieces: tuple[Piece, ...]


class RingCut:
    """The scores of one pass, for all pairs of ring ranks.

    Args:
        window: keys that a query sees, itself included; None: all before it.
    """

    def __init__(self, packing: SplitPacking, batch_size: int, window: int | None) -> None:
        self._window, self._batch_size = window, batch_size
        self._cuts = packing.cuts
        self._readings: tuple[tuple[Reading, ...], ...] | None = None
        self._firsts: list[list[int]] = []
        self._starts: list[list[int]] = []
        if not packing.is_one_per_row(batch_size, packing.seq_len):
            self._readings = readings_by_row(packing, batch_size, packing.seq_len, window)
            self._find_firsts(packing)
        self._met: dict[tuple[tuple[Span, ...], int, int], tuple[Meeting, ...]] = {}

    def queries(self, rank: int, stretches: Sequence[Span]) -> list[Chunk]:
        """The chunks of a tensor that holds these stretches of the rank's tokens, one behind the other."""
        found = []
        for chunk in self._chunks(rank):
            length, base = chunk.span[1] - chunk.span[0], 0
            for begin, end in stretches:
                low, high = max(begin, chunk.at), min(end, chunk.at + length)
                if low < high:
                    span = chunk.span[0] + low - chunk.at, chunk.span[0] + high - chunk.at
                    found.append(Chunk(chunk.rows, base + low - begin, span))
                base += end - begin
        return found

    def meetings(self, rank: int, stretches: Sequence[Span], source: int) -> tuple[Meeting, ...]:
        """What these queries of one rank see of the keys of `source`, in a fixed order."""
        key = tuple(stretches), rank, source
        if key not in self._met:
            self._met[key] = tuple(self._meet(self.queries(rank, stretches), self._chunks(source)))
        return self._met[key]

    def _chunks(self, rank: int) -> list[Chunk]:
        """All tokens of a rank. Where rows are one document each they are cut alike and go together."""
        together = self._readings is None
        cuts = [((0, self._batch_size), self._cuts[0])] if together else self._each_row()
        found = []
        for rows, cut in cuts:
            at = 0
            for span in cut[rank]:
                found.append(Chunk(rows, at, span))
                at += span[1] - span[0]
        return found

    def _each_row(self) -> list[tuple[Span, tuple[tuple[Span, ...], ...]]]:
        return [((row, row + 1), cut) for row, cut in enumerate(self._cuts)]

    def _meet(self, queries: Sequence[Chunk], keys: Sequence[Chunk]) -> Iterator[Meeting]:
        by_row: dict[int, list[Chunk]] = {}
        for chunk in keys:
            by_row.setdefault(chunk.rows[0], []).append(chunk)
        for number, query in enumerate(queries):
            row, first = query.rows[0], self._first_seen(query)
            of_row = by_row.get(row, [])
            near = bisect.bisect_right(of_row, first, key=lambda chunk: chunk.span[1])
            for chunk in of_row[near:]:
                if chunk.span[0] >= query.span[1]:
                    break
                pieces = block_pieces(
                    chunk.span,
                    query.span,
                    batch_size=query.rows[1] - row,
                    readings=None if self._readings is None else self._readings[row : row + 1],
                    window=self._window,
                )
                if pieces:
                    yield Meeting(number, chunk, pieces)

    def _first_seen(self, query: Chunk) -> int:
        """No token of the chunk sees a key before this place."""
        if self._readings is None:
            return 0
        row = query.rows[0]
        return self._firsts[row][bisect.bisect_right(self._starts[row], query.span[0]) - 1]

    def _find_firsts(self, packing: SplitPacking) -> None:
        """Of every document of every row: where it starts, and where the first document that it continues does."""
        self._firsts = [[] for _ in range(self._batch_size)]
        self._starts = [[] for _ in range(self._batch_size)]
        begins: list[int] = []
        place = 0
        for document, length in enumerate(packing.lengths):
            row, begin = divmod(place, packing.seq_len)
            begins.append(begin)
            self._starts[row].append(begin)
            self._firsts[row].append(begins[[document, *packing.ancestors(document)][-1]])
            place += length
