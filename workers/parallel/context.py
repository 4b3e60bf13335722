"""A rank's tokens of rows that the ranks of a context group share: ring x Ulysses x tensor.

One index cuts tokens, targets, positions and documents. A ring rank has the spans that `cut_row` gives it; its tokens,
in order, are split evenly over the Ulysses ranks. Tensor ranks have the same batch: row form (B, n t), of every token
i of the t ranks side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import TokenBatch
from headrace.workers.parallel.config import RingLayout
from headrace.workers.parallel.dims import Axis, ParallelDims
from headrace.workers.parallel.row_cut import Span, Spans, cut_row, layout_of, length_problem, num_hops


@dataclass(frozen=True, kw_only=True)
class SplitPacking(Packing):
    """The documents of whole rows, of which this rank has some tokens.

    Args:
        seq_len: T, tokens of a whole row.
        cuts: of every row, the spans of every ring rank.
        places: (B, n) int64, the place in its row of every token of this rank.
        hops: how often keys and values are passed on around the ring.
    """

    seq_len: int
    hops: int
    cuts: tuple[tuple[Spans, ...], ...]
    places: torch.Tensor

    def positions(
        self, batch_size: int, seq_len: int, device: torch.device, span: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """(B, n) int64: the place of every token of this rank in its sequence. `span`: not used, there are no parts."""
        return self.positions_at(self.places.to(device), batch_size, seq_len)

    def documents(self, batch_size: int, seq_len: int) -> torch.Tensor:
        """(B, n) int64 on the host: the number of the document of every token of this rank."""
        return super().documents(batch_size, seq_len).gather(1, self.places)


@dataclass(frozen=True, kw_only=True)
class SplitBatch(TokenBatch):
    """A rank's tokens of a micro-batch: tokens and targets are (B, n); documents are those of the whole rows.

    Args:
        rows: the whole micro-batch.
        index / count: of this rank among those that share its tokens.
        tensor: ranks that have the same part, and share its work.
    """

    rows: TokenBatch
    index: int
    count: int
    tensor: int = 1

    @property
    def seq_len(self) -> int:
        """Tokens of a whole row."""
        return self.rows.seq_len

    @property
    def num_tokens(self) -> int:
        """This rank's even share of the tokens of documents; the shares of all ranks add up to them."""
        total = self.rows.num_tokens
        return total * (self.index + 1) // self.count - total * self.index // self.count

    @property
    def num_sharers(self) -> int:
        """Ranks that share the rows."""
        return self.count * self.tensor

    def part(self, span: Span) -> tuple[torch.Tensor, torch.Tensor, Packing]:
        """See TokenBatch: this rank's even share of the span, as if that were a row. Without a ring."""
        assert isinstance(self.packing, SplitPacking), "see TokenIndex.split"
        places = rank_places(torch.arange(*span), self.count, self.index, self.tensor)
        packing = replace(self.packing, places=places.expand(len(self.tokens), -1))
        return self.rows.tokens[:, places], self.rows.targets[:, places], packing


@dataclass(frozen=True)
class TokenIndex:
    """Which tokens of any row this rank has.

    Args:
        window: of the model's attention; None: it has none.
    """

    ring: int
    ulysses: int
    ring_rank: int
    ulysses_rank: int
    layout: RingLayout
    window: int | None = None
    tensor: int = 1

    @classmethod
    def of(cls, dims: ParallelDims, rank: int, layout: RingLayout, window: int | None) -> TokenIndex:
        """That of a rank of the run."""
        place = dims.coordinate(rank)
        return cls(dims.ring, dims.ulysses, place[Axis.ring], place[Axis.ulysses], layout, window, dims.tensor)

    def split(self, batch: TokenBatch) -> TokenBatch:
        """This rank's part of a micro-batch; the batch itself where no rank shares its rows.

        Raises:
            InputError: rows that the ranks cannot share evenly.
        """
        count = self.ring * self.ulysses
        if count == self.tensor == 1:
            return batch
        packing = self._packing(batch.packing, *batch.tokens.shape)
        places = packing.places
        return SplitBatch(
            batch.tokens.gather(1, places),
            batch.targets.gather(1, places),
            packing,
            batch.padding,
            rows=batch,
            index=self.ring_rank * self.ulysses + self.ulysses_rank,
            count=count,
            tensor=self.tensor,
        )

    def _packing(self, whole: Packing, batch_size: int, seq_len: int) -> SplitPacking:
        degrees = {"tensor": self.tensor, "ulysses": self.ulysses, "ring": self.ring}
        if problem := length_problem(f"rows of {seq_len} tokens", seq_len, **degrees):
            raise InputError(problem)
        ring, window = self.ring, self.window
        layout = layout_of(self.layout, ring=ring, seq_len=seq_len, window=window)
        cuts, places = [], []
        for lengths in lengths_by_row(whole, batch_size, seq_len):
            cut = cut_row(lengths, self.ring, layout)
            own = torch.cat([torch.arange(*span) for span in cut[self.ring_rank]])
            cuts.append(cut)
            places.append(rank_places(own, self.ulysses, self.ulysses_rank, self.tensor))
        return SplitPacking(
            whole.cu_seqlens,
            whole.lengths,
            whole.parents,
            seq_len=seq_len,
            hops=num_hops(layout, ring=ring, seq_len=seq_len, window=window),
            cuts=tuple(cuts),
            places=torch.stack(places),
        )


def rank_places(places: torch.Tensor, ulysses: int, rank: int, tensor: int) -> torch.Tensor:
    """Of these places those of a Ulysses rank, token i of all tensor ranks side by side: (n / ulysses,) of (n,)."""
    return places.chunk(ulysses)[rank].view(tensor, -1).t().flatten()


def lengths_by_row(packing: Packing, batch_size: int, seq_len: int) -> list[list[int]]:
    """Tokens of the documents of every row."""
    rows: list[list[int]] = [[] for _ in range(batch_size)]
    place = 0
    for length in packing.lengths:
        rows[place // seq_len].append(length)
        place += length
    return rows
