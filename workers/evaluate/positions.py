"""Token losses, summed by the position of the token in its document."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from headrace.kernels.api import IGNORED_TARGET


@dataclass(frozen=True)
class Bucket:
    """Tokens at positions [begin, end) of their documents, counted from 0, and their losses.

    Args:
        num_tokens: whose targets count.
        loss_sum: of their losses, in nats.
    """

    begin: int
    end: int
    num_tokens: int
    loss_sum: float

    @property
    def loss(self) -> float:
        """Mean per token; nan where there is none."""
        return self.loss_sum / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf where that is beyond what a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where one is not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in self._figures().items()}
        return {"begin": self.begin, "end": self.end, "tokens": self.num_tokens, **finite}

    def _figures(self) -> dict[str, float]:
        return {"loss": self.loss, "perplexity": self.perplexity}


class PositionLosses:
    """Sums of token losses, fp64, in buckets [0, first), [first, 2 first), [2 first, 4 first), ...

    Args:
        first: tokens of the first bucket.
        longest: tokens of the longest document; no position is beyond it.
        device: of the losses.
    """

    def __init__(self, first: int, longest: int, device: torch.device) -> None:
        self._ends = [first]
        while self._ends[-1] < longest:
            self._ends.append(2 * self._ends[-1])
        self._sums = torch.zeros(len(self._ends), dtype=torch.float64, device=device)
        self._counts = torch.zeros(len(self._ends), dtype=torch.int64)

    def add(self, positions: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the losses of some tokens. A fixed order of summation: another cut of the tokens is another order.

        Args:
            positions / targets: (B, n) int64, on the CPU.
            losses: (B, n), 0 where a target does not count.
        """
        numbers = torch.bucketize(positions, torch.tensor(self._ends), right=True)
        counted, wide = targets != IGNORED_TARGET, losses.double()
        for number in numbers.unique().tolist():
            inside = numbers == number
            self._counts[number] += (inside & counted).sum()
            self._sums[number] += torch.where(inside.to(wide.device), wide, 0.0).sum()

    def buckets(self) -> list[Bucket]:
        """Those that have tokens."""
        begins = [0, *self._ends[:-1]]
        sums, counts = self._sums.tolist(), self._counts.tolist()
        found = [Bucket(*values) for values in zip(begins, self._ends, counts, sums, strict=True)]
        return [bucket for bucket in found if bucket.num_tokens]

    def whole(self) -> Bucket:
        """All positions as one bucket."""
        found = self.buckets()
        num_tokens = sum(bucket.num_tokens for bucket in found)
        return Bucket(0, self._ends[-1], num_tokens, math.fsum(bucket.loss_sum for bucket in found))
