"""Which tokens of a batch belong to one document."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Packing:
    """Documents laid end to end in the flattened B * T tokens; none spans two rows.

    A token sees its own document up to itself. A document may continue an earlier one of its row, as several responses
    continue one prompt: its tokens see all of that one too, and their positions go on behind it. Documents that
    continue another one follow it without a gap. No token sees any other document.

    Args:
        cu_seqlens: (num_docs + 1,) int32, the borders, from 0 to B * T; on the device of the tokens.
        lengths: of the documents in tokens, the same fact on the host.
        parents: of every document the number of the one that it continues, None where it continues none. Empty: no
            document continues another one.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    parents: tuple[int | None, ...] = ()

    @classmethod
    def of_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", *, parents: Sequence[int | None] = ()
    ) -> Packing:
        """Packing of documents of these lengths."""
        borders = list(itertools.accumulate(lengths, initial=0))
        return cls(torch.tensor(borders, dtype=torch.int32, device=device), tuple(lengths), tuple(parents))

    def parent(self, document: int) -> int | None:
        """The document that this one continues."""
        return self.parents[document] if self.parents else None

    def ancestors(self, document: int) -> list[int]:
        """The documents whose tokens this one sees, the nearest first."""
        parent = self.parent(document)
        return [] if parent is None else [parent, *self.ancestors(parent)]

    @cached_property
    def prefixes(self) -> tuple[int, ...]:
        """Of every document the number of tokens before it that its tokens see."""
        found: list[int] = []
        for document in range(len(self.lengths)):
            parent = self.parent(document)
            found.append(0 if parent is None else found[parent] + self.lengths[parent])
        return tuple(found)

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Tokens of every document and of those that it continues."""
        return tuple(prefix + length for prefix, length in zip(self.prefixes, self.lengths, strict=True))

    def positions(
        self, batch_size: int, seq_len: int, device: torch.device, span: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """(B, n) int64: the place of every token of a span of the rows in its sequence, from 0; None: of whole rows."""
        return self.positions_at(torch.arange(*(span or (0, seq_len)), device=device), batch_size, seq_len)

    def positions_at(self, places: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
        """(B, n) int64: the same of the tokens at these places of the rows, (B, n) or (n,) int64."""
        device = places.device
        borders = self.cu_seqlens.to(device=device, dtype=torch.int64)
        tokens = torch.arange(batch_size, device=device)[:, None] * seq_len + places
        starts = borders[:-1] - torch.tensor(self.prefixes, device=device) if self.parents else borders
        return tokens - starts[torch.bucketize(tokens, borders, right=True) - 1]

    def documents(self, batch_size: int, seq_len: int) -> torch.Tensor:
        """(B, T) int64 on the host: the number of every token's document."""
        numbers = torch.arange(len(self.lengths))
        return numbers.repeat_interleave(torch.tensor(self.lengths)).view(batch_size, seq_len)

    def is_one_per_row(self, batch_size: int, seq_len: int) -> bool:
        """Whether every row is one document: then there is nothing to keep apart."""
        return self.lengths == (seq_len,) * batch_size

    def first(self, batch_size: int, seq_len: int, num_tokens: int) -> Packing:
        """Packing of the first tokens of every row: documents end there at the latest."""
        lengths: list[int] = []
        parents: list[int | None] = []
        number_of: dict[int | None, int | None] = {None: None}
        place = 0
        for document, length in enumerate(self.lengths):
            if (kept := min(place + length, num_tokens) - place) > 0:
                number_of[document] = len(lengths)
                lengths.append(kept)
                parents.append(number_of[self.parent(document)])
            place = (place + length) % seq_len
        return Packing.of_lengths(lengths, self.cu_seqlens.device, parents=parents if self.parents else ())

    def check(self, batch_size: int, seq_len: int) -> None:
        """Raise ValueError where a document spans two rows, the lengths do not add up or a parent is out of place."""
        place, path = 0, list[int]()
        if self.parents and len(self.parents) != len(self.lengths):
            raise ValueError(f"packing: {len(self.parents)} parents of {len(self.lengths)} documents")
        for document, length in enumerate(self.lengths):
            if length < 1 or place + length > seq_len:
                raise ValueError(f"packing: documents {self.lengths} do not fill rows of {seq_len} tokens")
            # Of the documents before it in its row, those that the next one may continue.
            path = path if place else []
            parent = self.parent(document)
            if parent is not None and parent not in path:
                raise ValueError(
                    f"packing: document {document} continues document {parent}, which is not in its row or not right "
                    f"before it: parents {self.parents}"
                )
            path = [*path[: 0 if parent is None else path.index(parent) + 1], document]
            place = (place + length) % seq_len
        if sum(self.lengths) != batch_size * seq_len:
            raise ValueError(f"packing: {sum(self.lengths)} tokens in documents, {batch_size} x {seq_len} in the batch")
