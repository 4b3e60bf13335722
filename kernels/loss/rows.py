"""The loss head on some rows of the vocabulary, in parts: no collective inside, so that a pipeline may post them apart.

For hidden states h (N, D), this rank's rows W_r (V_r, D) and labels y (arXiv 2411.05288, algorithms 1 and 2):

    row_statistics     m_r = max W_r h, s_r = sum exp(W_r h - m_r), the label's logit, and A_r = softmax(W_r h) W_r
    merged             m and s of all rows:  loss = m + log s - z[y]
    hidden_part        A_r s_r exp(m_r - m) / s - W_r[y]: the sum over the ranks is d loss / d h
    row_gradients      G = exp(W_r h - m - log s) - onehot(y), made again: G W_r, and dW_r += G^T h

Sums and softmax are fp32 (fp64 for fp64). The sum of all token losses is what the gradients are of. No atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from headrace.kernels.backend import Backend
from headrace.kernels.loss.prepare import pick_steps
from headrace.kernels.loss.problem import IGNORED
from headrace.kernels.loss.steps import RowScales
from headrace.kernels.merge import lse_of_max_sum, merge_max_sum
from headrace.kernels.products import add_product_, product


class RowStatistics(NamedTuple):
    """Of every token, (N,) fp32 or fp64; see the module. picked: 0 where the label is not among the rows."""

    max: torch.Tensor
    sum_exp: torch.Tensor
    picked: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of the vocabulary, possibly none.

    Args:
        weight: (V_r, D).
        first: number of the first one.
        tile: tokens whose logits exist at once. Another tile is another order of summation.
    """

    weight: torch.Tensor
    first: int
    tile: int
    backend: Backend = Backend.auto

    def tiles(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Cuts of the tokens (N, D)."""
        return (slice(begin, begin + self.tile) for begin in range(0, len(hidden), self.tile))

    def of_labels(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which labels (n,) are among the rows, and their places (0 elsewhere)."""
        places = labels - self.first
        inside = (labels >= 0) & (places >= 0) & (places < len(self.weight))
        return inside, places.where(inside, 0)


def labels_of(targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """(N,) labels of targets of any shape, -1 where one does not count."""
    return torch.where(targets == ignore_index, IGNORED, targets).reshape(-1)


@torch.no_grad()
def row_statistics(
    rows: Rows, hidden: torch.Tensor, labels: torch.Tensor, *, with_mean: bool
) -> tuple[RowStatistics, torch.Tensor | None]:
    """Statistics of this rank's rows, and with `with_mean` A_r (N, D) of the tokens that count.

    Args:
        hidden: (N, D) in the dtype of the rows. labels: (N,) of the whole vocabulary; see labels_of.
    """
    wide, steps = _wide(hidden), pick_steps(rows.backend, hidden.device, hidden.dtype)
    found = RowStatistics(*(torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3)))
    mean = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if with_mean else None
    for tile in rows.tiles(hidden):
        logits = product(hidden[tile], rows.weight.t(), wide)
        stats = steps.stats(logits, labels[tile], None, first=rows.first, softcap=None)
        for whole, part in zip(found, (stats.max, stats.sum_exp, stats.picked), strict=True):
            whole[tile] = part
        if mean is not None:
            own = lse_of_max_sum(stats.max, stats.sum_exp)
            softmax = _gradient(rows, hidden, logits, labels[tile], own, of_label=0.0)
            mean[tile] = product(softmax, rows.weight, wide)
    return found, mean


def merged(parts: Sequence[RowStatistics]) -> tuple[torch.Tensor, torch.Tensor]:
    """LSE and token losses (N,) from the statistics of all rows, in their order. Ignored tokens: any."""
    largest, sum_exp, picked = parts[0]
    for part in parts[1:]:
        largest, sum_exp = merge_max_sum(largest, sum_exp, part.max, part.sum_exp)
        picked = picked + part.picked
    lse = lse_of_max_sum(largest, sum_exp)
    return lse, lse - picked


@torch.no_grad()
def hidden_part(
    rows: Rows, mean: torch.Tensor, own: RowStatistics, lse: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """This rank's part of the gradient of the hidden states, (N, D), in the memory of `mean`."""
    share = (lse_of_max_sum(own.max, own.sum_exp) - lse).exp()
    mean.mul_(share[:, None])
    if len(rows.weight):
        for tile in rows.tiles(mean):
            inside, places = rows.of_labels(labels[tile])
            mean[tile] -= F.embedding(places, rows.weight).masked_fill_(~inside[:, None], 0.0)
    return mean


@torch.no_grad()
def row_gradients(
    rows: Rows,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    *,
    d_rows: torch.Tensor | None,
    with_hidden: bool,
) -> torch.Tensor | None:
    """Gradients from the LSE of all rows.

    Args:
        d_rows: (V_r, D) fp32 or fp64; dW_r is added to it. None: it is not wanted.

    Returns:
        With `with_hidden` this rank's part of the gradient of hidden, (N, D) fp32 or fp64.
    """
    wide = _wide(hidden)
    d_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if with_hidden else None
    for tile in rows.tiles(hidden):
        logits = product(hidden[tile], rows.weight.t(), wide)
        d_logits = _gradient(rows, hidden, logits, labels[tile], lse[tile], of_label=1.0)
        if d_hidden is not None:
            d_hidden[tile] = product(d_logits, rows.weight, wide)
        if d_rows is not None:
            add_product_(d_rows, d_logits.t(), hidden[tile])
    return d_hidden


def _gradient(
    rows: Rows,
    hidden: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    *,
    of_label: float,
) -> torch.Tensor:
    """exp(logits - lse) - of_label onehot, 0 for ignored tokens, in the dtype of hidden. Overwrites the logits."""
    steps, counts = pick_steps(rows.backend, hidden.device, hidden.dtype), (labels != IGNORED).to(logits.dtype)
    out = None if logits.dtype is hidden.dtype else torch.empty_like(logits, dtype=hidden.dtype)
    steps.gradient_(
        logits, labels, lse, RowScales(counts, of_label * counts, None), first=rows.first, softcap=None, out=out
    )
    return logits if out is None else out


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32
