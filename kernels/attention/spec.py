"""What one call of attention computes: the arguments that forward and backward share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.kernels.attention.cut import Piece, Span, block_bounds, block_pieces, check_blocks, readings_by_row
from headrace.kernels.attention.operators import choose_operator
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing


@dataclass(frozen=True)
class AttentionSpec:
    """What one call computes. Forward and backward of a call take the same one; `spec_for` makes it from tensors.

    Args:
        scale: of the scores.
        num_keys: S, of the whole row.
        operator: who computes; not auto.
        first_query: place in the row of the first of the T queries; None: the queries are the last T tokens.
        block_len: keys per KV block; None: all keys at once. The cut decides the order of summation, so results are
            bit-equal for equal cuts only.
        packing: documents that fill the (B, S) keys, where a row holds several.
        window: keys that a query sees, itself included; None means all before it.
        softcap: scores become softcap * tanh(score / softcap).

    Raises:
        ValueError: a number out of range, or `auto`.
    """

    scale: float
    num_keys: int
    operator: AttentionOperator
    first_query: int | None = None
    block_len: int | None = None
    packing: Packing | None = None
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.operator is AttentionOperator.auto:
            raise ValueError("operator=auto: a spec names its operator; choose_operator says which one")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: at least 1")
        check_blocks(self.num_keys, self.num_keys if self.block_len is None else self.block_len)

    @property
    def bounds(self) -> tuple[Span, ...]:
        """[begin, end) of every KV block in the row."""
        return block_bounds(self.num_keys, self.num_keys if self.block_len is None else self.block_len)

    @property
    def continues(self) -> bool:
        """Whether some document continues another one."""
        return self.packing is not None and any(parent is not None for parent in self.packing.parents)

    def queries(self, num_queries: int) -> Span:
        """[begin, end) of the queries in the row.

        Raises:
            ValueError: queries that reach beyond the keys.
        """
        first = self.num_keys - num_queries if self.first_query is None else self.first_query
        if num_queries < 1 or first < 0 or first + num_queries > self.num_keys:
            raise ValueError(f"{num_queries} queries from {first}: at least 1, within the {self.num_keys} keys")
        return first, first + num_queries

    def schedule(self, batch_size: int, num_queries: int) -> dict[int, tuple[Piece, ...]]:
        """The pieces of every block that a query sees, oldest block first; other blocks are not fetched."""
        readings = None
        if self.packing is not None and not self.packing.is_one_per_row(batch_size, self.num_keys):
            readings = readings_by_row(self.packing, batch_size, self.num_keys, self.window)
        queries = self.queries(num_queries)
        pieces = {}
        for index, block in enumerate(self.bounds):
            found = block_pieces(block, queries, batch_size=batch_size, readings=readings, window=self.window)
            if found:
                pieces[index] = found
        return pieces


def spec_for(
    q: torch.Tensor,
    num_keys: int,
    *,
    scale: float,
    operator: AttentionOperator = AttentionOperator.auto,
    first_query: int | None = None,
    block_len: int | None = None,
    packing: Packing | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """The spec of queries (B, T, Hq, D) like `q`, with its operator chosen.

    A packing of one document per row and a window that no document exceeds are left out: they change nothing.

    Raises:
        ValueError: documents that do not fill the rows, or an operator that cannot do this.
    """
    batch_size = q.shape[0]
    if packing is not None:
        packing.check(batch_size, num_keys)
        if packing.is_one_per_row(batch_size, num_keys):
            packing = None
    longest = num_keys if packing is None else max(packing.sequence_lengths)
    if window is not None and window >= longest:
        window = None
    chosen = choose_operator(operator, q, packed=packing is not None, window=window, softcap=softcap)
    return AttentionSpec(scale, num_keys, chosen, first_query, block_len, packing, window, softcap)
