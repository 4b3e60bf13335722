"""Attention over some of the keys of the first KV blocks: those that are left stand together, gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from headrace.kernels.attention.cut import Piece, PieceKind, Span
from headrace.kernels.attention.spec import AttentionSpec


@dataclass(frozen=True, kw_only=True)
class SelectedSpec(AttentionSpec):
    """A spec whose first blocks hold fewer keys than the row has there.

    Only blocks before every query can be gathered, and no window is known: then every query that sees a block sees all
    of its keys, and their places do not matter. Where nothing is left out, the pieces are those of the whole block, so
    the results have the same bits.

    Args:
        gathered: for each of the first blocks and each row of the batch, the keys that its queries see, as if the
            block's gathered keys stood at the block's begin. (begin, begin): none.
    """

    gathered: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            raise ValueError(f"window={self.window}: keys are not gathered under a window")

    @cached_property
    def bounds(self) -> tuple[Span, ...]:
        """See AttentionSpec; a gathered block ends with the keys of the row that has most of them."""
        whole = super().bounds
        ends = (max(end for _, end in rows) for rows in self.gathered)
        return (*((begin, end) for (begin, _), end in zip(whole, ends, strict=False)), *whole[len(self.gathered) :])

    def schedule(self, batch_size: int, num_queries: int) -> dict[int, tuple[Piece, ...]]:
        """See AttentionSpec. Rows that one piece of the whole block holds stay one piece where they see equal keys."""
        whole = AttentionSpec(**{name: getattr(self, name) for name in AttentionSpec.__dataclass_fields__})
        pieces: dict[int, tuple[Piece, ...]] = {}
        for index, of_block in whole.schedule(batch_size, num_queries).items():
            if index < len(self.gathered):
                of_block = tuple(part for piece in of_block for part in _parts(piece, self.gathered[index]))
            if of_block:
                pieces[index] = of_block
        return pieces


def _parts(piece: Piece, rows: Sequence[Span]) -> Iterator[Piece]:
    if piece.kind is not PieceKind.full:
        raise ValueError(f"{piece}: only blocks before every query are gathered")
    begin, last = piece.rows
    while begin < last:
        end = next((row for row in range(begin, last) if rows[row] != rows[begin]), last)
        if rows[begin][0] < rows[begin][1]:
            yield Piece((begin, end), piece.queries, rows[begin], PieceKind.full)
        begin = end
