"""One call of the loss head, checked and cut: what both axes work on, and the blocks of logits they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headrace.kernels.loss.checks import Terms
from headrace.kernels.loss.options import Cuts, LossOptions
from headrace.kernels.loss.shards import Shard
from headrace.kernels.loss.steps import BlockStats, RowScales
from headrace.kernels.merge import lse_of_max_sum
from headrace.kernels.products import product

# The label of a token that does not count.
IGNORED = -1


class Steps(NamedTuple):
    """Who does the elementwise work on a block of logits: `steps.py` or its Triton form.

    cap_: bias and softcap without the statistics; None where only `stats` does it to the same bits.
    num_temporaries: blocks of logits that it allocates beside the one it is given.
    """

    stats: Callable[..., BlockStats]
    gradient_: Callable[..., torch.Tensor | None]
    cap_: Callable[..., None] | None
    num_temporaries: int


class Gradients(NamedTuple):
    """Of hidden (N, D), weight (V, D) and bias (V,); None where it was not requested."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class Dtypes(NamedTuple):
    """inputs: of hidden and weight. wide: of logits and softmax. sums: of the gradients' sums over chunks. weight_grad,
    bias_grad: in which those gradients are handed on."""

    inputs: torch.dtype
    wide: torch.dtype
    sums: torch.dtype
    weight_grad: torch.dtype
    bias_grad: torch.dtype


@dataclass(frozen=True)
class Problem:
    """A call without its differentiable tensors. M tokens are scored: all N, or those that count.

    labels: (M,) int64 columns of the whole vocabulary, IGNORED where a token does not count.
    rows: (M,) int64 positions of the scored tokens among the N; None where all are.
    scales: (M,) factors of a token's LSE, label logit and sum of logits in the loss (steps.py: a, (1 - s) w[y], s / V).
    class_weight: (V,) of this rank's rows, in the wide dtype.
    live: per chunk of tokens, whether any of it needs work.
    denominator: what reduction="mean" divides by.
    """

    labels: torch.Tensor
    rows: torch.Tensor | None
    num_tokens: int
    scales: RowScales
    class_weight: torch.Tensor | None
    terms: Terms
    options: LossOptions
    shard: Shard
    cuts: Cuts
    steps: Steps
    dtypes: Dtypes
    live: tuple[bool, ...]
    denominator: float | torch.Tensor

    def chunks(self) -> Iterator[slice]:
        """The chunks of scored tokens that need work."""
        for index, is_live in enumerate(self.live):
            if is_live:
                yield slice(index * self.cuts.tokens, min((index + 1) * self.cuts.tokens, len(self.labels)))

    def column_slices(self) -> Iterator[slice]:
        """The slices of this rank's rows of the weight."""
        for first in range(0, self.shard.num_rows, self.cuts.columns):
            yield slice(first, min(first + self.cuts.columns, self.shard.num_rows))

    def take(self, hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Hidden states (c, D) of a chunk of scored tokens."""
        return hidden[chunk] if self.rows is None else hidden.index_select(0, self.rows[chunk])

    def put(self, out: torch.Tensor, chunk: slice, values: torch.Tensor) -> None:
        """Write (c, ...) values of a chunk to their tokens in `out` (N, ...)."""
        if self.rows is None:
            out[chunk] = values
        else:
            out.index_copy_(0, self.rows[chunk], values.to(out.dtype))

    def block(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: slice, columns: slice
    ) -> tuple[torch.Tensor, BlockStats]:
        """Capped logits (c, v) of a chunk's hidden (c, D) with a slice of the weight (V, D), and their statistics."""
        logits = product(hidden, weight[columns].t(), self.dtypes.wide)
        stats = self.steps.stats(
            logits,
            self.labels[chunk],
            None if bias is None else bias[columns],
            first=self.shard.first + columns.start,
            softcap=self.terms.softcap,
            class_weight=None if self.class_weight is None else self.class_weight[columns],
            want_total=self.scales.smooth is not None,
        )
        return logits, stats

    def again(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: slice, columns: slice
    ) -> torch.Tensor:
        """The logits of `block` once more, to the bit, without statistics."""
        if self.steps.cap_ is None and (bias is not None or self.terms.softcap is not None):
            return self.block(hidden, weight, bias, chunk, columns)[0]
        logits = product(hidden, weight[columns].t(), self.dtypes.wide)
        if self.steps.cap_ is not None:
            self.steps.cap_(logits, None if bias is None else bias[columns], self.terms.softcap)
        return logits

    def gradient(
        self, logits: torch.Tensor, lse: torch.Tensor, scales: RowScales, chunk: slice, columns: slice
    ) -> torch.Tensor:
        """Gradient (c, v) of a block's raw logits in the inputs' dtype; overwrites `logits`."""
        narrow = self.dtypes.inputs
        out = None if logits.dtype is narrow else torch.empty(logits.shape, dtype=narrow, device=logits.device)
        kept = self.steps.gradient_(
            logits,
            self.labels[chunk],
            lse,
            scales,
            first=self.shard.first + columns.start,
            softcap=self.terms.softcap,
            class_weight=None if self.class_weight is None else self.class_weight[columns],
            filter_eps=self.options.filter_eps,
            out=out,
        )
        if kept is not None and self.options.filter_stats is not None:
            self.options.filter_stats.add(kept, columns, self.shard.num_rows)
        return logits if out is None else out

    def losses(self, stats: BlockStats, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """LSE and loss (c,) of a chunk from the statistics of the whole vocabulary; 0 where a token does not count."""
        scales = self._scales(chunk)
        lse = lse_of_max_sum(stats.max, stats.sum_exp)
        loss = scales.softmax * lse - scales.label * stats.picked
        if scales.smooth is not None and stats.total is not None:
            loss -= scales.smooth * stats.total
        if self.terms.z_loss > 0:
            loss += self.terms.z_loss * lse.square()
        return lse, torch.where(self.labels[chunk] == IGNORED, 0.0, loss)

    def gradient_scales(
        self,
        chunk: slice,
        lse: torch.Tensor,
        upstream: torch.Tensor | None = None,
        lse_upstream: torch.Tensor | None = None,
    ) -> RowScales:
        """Factors of a chunk's gradient.

        Args:
            lse: (c,). upstream: (c,) d out / d loss, None for 1. lse_upstream: (c,) d out / d LSE, None for 0.
        """
        softmax, label, smooth = self._scales(chunk)
        if self.terms.z_loss > 0:
            softmax = softmax + torch.where(self.labels[chunk] == IGNORED, 0.0, 2.0 * self.terms.z_loss * lse)
        if upstream is not None:
            softmax, label = softmax * upstream, label * upstream
            smooth = None if smooth is None else smooth * upstream
        if lse_upstream is not None:
            softmax = softmax + lse_upstream
        return RowScales(softmax, label, smooth)

    def _scales(self, chunk: slice) -> RowScales:
        softmax, label, smooth = self.scales
        return RowScales(softmax[chunk], label[chunk], None if smooth is None else smooth[chunk])
