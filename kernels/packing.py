"""Which tokens of a batch belong to one document."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Documents laid end to end in the flattened B * T tokens; none spans two rows, no token sees another document.

    Args:
        cu_seqlens: (num_docs + 1,) int32, the borders, from 0 to B * T; on the device of the tokens.
        lengths: of the documents in tokens, the same fact on the host.
    """

    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...] | list[int], device: torch.device | str = "cpu") -> Packing:
        """Packing of documents of these lengths."""
        borders = list(itertools.accumulate(lengths, initial=0))
        return cls(torch.tensor(borders, dtype=torch.int32, device=device), tuple(lengths))

    def positions(
        self, batch_size: int, seq_len: int, device: torch.device, span: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """(B, n) int64: the place of every token of a span of the rows in its document, from 0; None: of whole rows."""
        begin, end = span or (0, seq_len)
        borders = self.cu_seqlens.to(device=device, dtype=torch.int64)
        rows = torch.arange(batch_size, device=device)[:, None] * seq_len
        tokens = rows + torch.arange(begin, end, device=device)
        return tokens - borders[torch.bucketize(tokens, borders, right=True) - 1]

    def documents(self, batch_size: int, seq_len: int) -> torch.Tensor:
        """(B, T) int64 on the host: the number of every token's document."""
        numbers = torch.arange(len(self.lengths))
        return numbers.repeat_interleave(torch.tensor(self.lengths)).view(batch_size, seq_len)

    def is_one_per_row(self, batch_size: int, seq_len: int) -> bool:
        """Whether every row is one document: then there is nothing to keep apart."""
        return self.lengths == (seq_len,) * batch_size

    def first(self, batch_size: int, seq_len: int, num_tokens: int) -> Packing:
        """Packing of the first tokens of every row: documents end there at the latest."""
        lengths, place = [], 0
        for length in self.lengths:
            if (kept := min(place + length, num_tokens) - place) > 0:
                lengths.append(kept)
            place = (place + length) % seq_len
        return Packing.of_lengths(lengths, self.cu_seqlens.device)

    def check(self, batch_size: int, seq_len: int) -> None:
        """Raise ValueError where a document spans two rows or the lengths do not add up."""
        place = 0
        for length in self.lengths:
            if length < 1 or place + length > seq_len:
                raise ValueError(f"packing: documents {self.lengths} do not fill rows of {seq_len} tokens")
            place = (place + length) % seq_len
        if sum(self.lengths) != batch_size * seq_len:
            raise ValueError(f"packing: {sum(self.lengths)} tokens in documents, {batch_size} x {seq_len} in the batch")
