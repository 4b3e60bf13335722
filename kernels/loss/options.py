"""How the loss head cuts its work: the chunk axis, the cut sizes, and what a caller may say about both.

The matrix of logits, N tokens by V columns, is never whole in memory. Two ways to cut it:

tokens: all columns of a few tokens at a time. Their gradients are made in forward from the logits at hand: three
    matrix products. The fp32 weight gradient (V x D) is read and written once per chunk, and is kept from forward to
    backward.
vocabulary: forward keeps one LSE per token, backward makes the logits again, a slice of columns at a time: four
    products. The weight gradient is written once, slice by slice; the input gradient is added up instead, which is
    small. Only the LSE is kept from forward to backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from headrace.kernels.loss.filtering import FilterStats

IGNORED_TARGET = -100
MIB = 2**20
# Rates of one H200 on bf16 products and on streaming sums, that fix where the axes break even; only their ratio counts.
PRODUCT_FLOPS_PER_S = 788e12
SUM_BYTES_PER_S = 4.0e12


class ChunkAxis(StrEnum):
    """Along which axis the logits are cut; see the module.

    auto: `tokens` where the gradients can be made in forward and the estimate of `choose_axis` is in its favour.
    """

    auto = "auto"
    tokens = "tokens"
    vocabulary = "vocabulary"


class WeightSum(StrEnum):
    """What the gradient of a DTensor weight is, over the ranks that hold its shards.

    same: every rank scores the same tokens, so each has the whole gradient already.
    sum: each rank scores tokens of its own; their gradients are added (reduce-scatter), as data parallel needs it.
    """

    same = "same"
    sum = "sum"


@dataclass(frozen=True)
class LossOptions:
    """Choices that change speed, memory or the order of summation, not the mathematics (filter_eps apart).

    axis: along which the logits are cut.
    workspace_bytes: of the block of logits and what goes with it. The cuts follow from it; a block is at least one
        token (tokens axis) or one token by 128 columns (vocabulary axis).
    tokens_per_chunk: fixes the cut along tokens, by position. Another cut is another order of summation and changes
        bits. Without it, ignored tokens are taken out before the cut.
    columns_per_chunk: fixes the cut along the vocabulary; vocabulary axis only.
    sum_dtype: in which both gradients are summed over chunks; None means fp32 (fp64 for fp64 inputs), else the inputs'
        own dtype, which halves the sums and, in bf16, loses digits (about 2 % at 512 chunks).
    filter_eps: leave out tiles of the logit gradient (128 tokens by 128 columns) in which no |softmax - onehot| reaches
        this; see `filter_threshold`. None is exact.
    filter_stats: where filtered calls add their counts.
    weight_sum: for a DTensor weight. None means `same`, and is refused where the ranks score different tokens.
    on_sent: called with the bytes that this rank sends to its `group`, for every all-reduce.
    deterministic: nothing here uses atomics, so the same call gives the same bits either way; False lets
        backend=stock pick its kernels by timing them, which may give other bits in another run.
    """

    axis: ChunkAxis = ChunkAxis.auto
    workspace_bytes: int = 256 * MIB
    tokens_per_chunk: int | None = None
    columns_per_chunk: int | None = None
    sum_dtype: torch.dtype | None = None
    filter_eps: float | None = None
    filter_stats: FilterStats | None = field(default=None, compare=False)
    weight_sum: WeightSum | None = None
    on_sent: Callable[[int], None] | None = field(default=None, compare=False)
    deterministic: bool = True

    def __post_init__(self) -> None:
        for name in ("workspace_bytes", "tokens_per_chunk", "columns_per_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LossOptions: {name}={value}: at least 1")
        if self.columns_per_chunk is not None and self.axis is ChunkAxis.tokens:
            raise ValueError("LossOptions: columns_per_chunk is for axis=vocabulary, not axis=tokens")
        if self.filter_eps is not None and not 0.0 < self.filter_eps < 1.0:
            raise ValueError(f"LossOptions: filter_eps={self.filter_eps}: above 0 and below 1, or None")
        if self.filter_stats is not None and self.filter_eps is None:
            raise ValueError("LossOptions: filter_stats without filter_eps would count nothing")


@dataclass(frozen=True)
class Cuts:
    """A block of logits is `tokens` by `columns`; along the tokens axis `columns` is the whole (local) vocabulary."""

    axis: ChunkAxis
    tokens: int
    columns: int


@dataclass(frozen=True)
class HeadShape:
    """Sizes that the cuts follow from.

    num_tokens, vocab_size, width: N, V and D; V of the largest shard, so that all ranks cut alike.
    logit_bytes: of everything that exists once per logit of a block.
    sum_bytes: of one entry of a gradient sum.
    """

    num_tokens: int
    vocab_size: int
    width: int
    logit_bytes: int
    sum_bytes: int = 4


def plan_cuts(shape: HeadShape, options: LossOptions, *, in_forward: bool) -> Cuts:
    """The axis and the cuts.

    Args:
        in_forward: whether gradients can be made in forward (one upstream factor for all tokens), as `tokens` needs.

    Raises:
        ValueError: axis=tokens where it cannot work.
    """
    tokens, vocabulary = _tokens_cuts(shape, options), _vocabulary_cuts(shape, options)
    if options.axis is ChunkAxis.tokens:
        if not in_forward:
            raise ValueError(
                "linear_cross_entropy: options.axis=tokens makes gradients before the upstream gradient of each token "
                "is known, so it has no reduction='none' and no return_lse=True; expected axis=vocabulary or auto"
            )
        return tokens
    if options.axis is ChunkAxis.vocabulary or not in_forward or options.columns_per_chunk is not None:
        return vocabulary
    return tokens if choose_axis(shape, tokens, vocabulary) is ChunkAxis.tokens else vocabulary


def choose_axis(shape: HeadShape, tokens: Cuts, vocabulary: Cuts) -> ChunkAxis:
    """The faster axis by estimate: three products and weight-sum traffic against four products.

    With c tokens per chunk the sum of the weight gradient costs 2 x 4 V D bytes per chunk, the fourth product
    2 V D c FLOPs: they break even near 790 tokens. A single chunk adds nothing up and always wins.
    """
    return min((tokens, vocabulary), key=lambda cuts: seconds(shape, cuts)).axis


def seconds(shape: HeadShape, cuts: Cuts) -> float:
    """Estimated time of forward and backward: products, and sums read and written beyond the first write."""
    product = 2.0 * shape.num_tokens * shape.vocab_size * shape.width / PRODUCT_FLOPS_PER_S
    token_chunks = math.ceil(shape.num_tokens / cuts.tokens)
    sums = max(token_chunks - 1, 0) * shape.vocab_size * shape.width
    num_products = 3
    if cuts.axis is ChunkAxis.vocabulary:
        num_products = 4
        sums += max(math.ceil(shape.vocab_size / cuts.columns) - 1, 0) * shape.num_tokens * shape.width
    return num_products * product + 2.0 * shape.sum_bytes * sums / SUM_BYTES_PER_S


def filter_threshold(dtype: torch.dtype) -> float:
    """A filter_eps below which rounding to `dtype` hides what is left out: its machine epsilon / 32.

    2^-12 for bf16, 2^-15 for fp16, 2^-28 for fp32 (Cut Cross-Entropy, arXiv 2411.09009). A row of softmax sums to 1, so
    at most 1 / eps of its entries pass.
    """
    return torch.finfo(dtype).eps / 32


def _tokens_cuts(shape: HeadShape, options: LossOptions) -> Cuts:
    vocab_size = max(shape.vocab_size, 1)
    tokens = options.tokens_per_chunk
    if tokens is None:
        tokens = _even(options.workspace_bytes // (vocab_size * shape.logit_bytes), shape.num_tokens)
    return Cuts(ChunkAxis.tokens, tokens, vocab_size)


def _vocabulary_cuts(shape: HeadShape, options: LossOptions) -> Cuts:
    """Near-square blocks add up the least; all tokens in one block where there are at most twice a square's."""
    tokens, columns = options.tokens_per_chunk, options.columns_per_chunk
    if tokens is None:
        side = math.isqrt(options.workspace_bytes // shape.logit_bytes)
        wanted = side if columns is None else options.workspace_bytes // (columns * shape.logit_bytes)
        tokens = shape.num_tokens if shape.num_tokens <= 2 * wanted and columns is None else wanted
        tokens = _even(tokens, shape.num_tokens)
    if columns is None:
        # Beside the block: its slice of the weight gradient's sum.
        column_bytes = tokens * shape.logit_bytes + shape.width * shape.sum_bytes
        columns = _even(max(options.workspace_bytes // column_bytes, 128), max(shape.vocab_size, 1))
    return Cuts(ChunkAxis.vocabulary, tokens, min(columns, max(shape.vocab_size, 1)))


def _even(size: int, whole: int) -> int:
    """At most `whole`, else a multiple of 128 or 8 where it is that large; at least 1."""
    if size >= whole:
        return max(whole, 1)
    for multiple in (128, 8):
        if size >= multiple:
            return size // multiple * multiple
    return max(size, 1)
