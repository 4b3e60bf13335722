"""What one forward pass reads: tokens, targets, and which of them may see each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.storage.core.errors import InputError
from headrace.workers.data.rows import CONTINUES, PADDING, STARTS, TARGET


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one rank, in host memory.

    Args:
        tokens: (B, T) int64.
        targets: (B, T) int64, the token that follows each, shifted already; -100 where the loss does not count: tokens
            without a loss mask, and the first token of a document (nothing before it says what it will be).
        packing: the documents of the flattened B*T tokens; none spans two rows. Padding of a row is one of them. The
            responses to a prompt continue it: their tokens see the prompt, which is there once.
        padding: lengths of the fillings of rows, each of which packing counts as a document.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    packing: Packing
    padding: tuple[int, ...] = ()

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens of documents: without those that fill rows of data.buckets."""
        return self.tokens.numel() - sum(self.padding)

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of every document, without the fillings of rows."""
        return [length for length, _ in self._documents]

    @property
    def document_prefixes(self) -> list[int]:
        """Tokens before every document that its tokens see: those of the prompt that it continues."""
        return [prefix for _, prefix in self._documents]

    @property
    def _documents(self) -> list[tuple[int, int]]:
        found = Counter(zip(self.packing.lengths, self.packing.prefixes, strict=True))
        found.subtract((length, 0) for length in self.padding)
        return list(found.elements())

    @property
    def num_sharers(self) -> int:
        """Ranks that share the rows: each computes its part of them."""
        return 1

    @property
    def num_targets(self) -> int:
        """Targets that count in the loss."""
        return int((self.targets != IGNORED_TARGET).sum())

    def part(self, span: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, Packing]:
        """This rank's tokens and targets, (B, n) each, of a span of every row; the packing that says where they are."""
        return self.tokens[:, slice(*span)], self.targets[:, slice(*span)], self.packing


def to_batch(tokens: npt.NDArray[np.integer[Any]], flags: npt.NDArray[np.uint8]) -> TokenBatch:
    """Rows as stored to a batch; copies, so the arrays may be views of a reader's buffers.

    Args:
        tokens: (B, T + 1) token ids. flags: (B, T + 1), see headrace.workers.data.rows.

    Raises:
        InputError: more tokens than the 32-bit document borders of attention operators can count.
    """
    batch_size, seq_len = tokens.shape[0], tokens.shape[1] - 1
    num_tokens = batch_size * seq_len
    if num_tokens > np.iinfo(np.int32).max:
        raise InputError(
            f"data.seq_len={seq_len} x train.batch_size={batch_size}: {num_tokens} tokens in a micro-batch, attention "
            "counts to 2^31 - 1; lower train.batch_size"
        )
    ids = tokens.astype(np.int64)
    counts = (flags[:, 1:] & (STARTS | TARGET)) == TARGET
    targets = np.where(counts, ids[:, 1:], IGNORED_TARGET)
    starts = (flags[:, :-1] & STARTS) != 0
    starts[:, 0] = True
    borders = np.append(np.flatnonzero(starts), num_tokens).astype(np.int32)
    lengths = np.diff(borders)
    of_starts = flags[:, :-1].ravel()[borders[:-1]]
    packing = Packing(torch.from_numpy(borders), tuple(lengths.tolist()), _parents((of_starts & CONTINUES) != 0))
    fills = (of_starts & PADDING) != 0
    padding = tuple(lengths[fills].tolist())
    return TokenBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets), packing, padding)


def _parents(continues: npt.NDArray[np.bool_]) -> tuple[int | None, ...]:
    """Of every document the last one before it that does not continue another one, where it continues one."""
    if not continues.any():
        return ()
    numbers = np.maximum.accumulate(np.where(continues, 0, np.arange(len(continues))))
    return tuple(int(number) if own else None for number, own in zip(numbers, continues, strict=True))
