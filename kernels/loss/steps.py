"""The two elementwise steps of the loss head on one block of logits: its softmax statistics, and its gradient.

A block is n tokens by v vocabulary columns that begin at column `first` of the whole vocabulary. With z the logits
after bias and softcap, p = exp(z - LSE), w the class weights (1 without), s the label smoothing and V the vocabulary:

    loss = a LSE - (1 - s) w[y] z[y] - s / V sum_c w[c] z[c] + zeta LSE^2,   a = (1 - s) w[y] + s / V sum_c w[c]

    d loss / d z[c] = (a + 2 zeta LSE) p[c] - (1 - s) w[y] [c = y] - s / V w[c]

Plain torch. `kernels/fused/loss.py` has the same functions in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Tokens and vocabulary columns of the tiles that gradient filtering keeps or drops.
FILTER_TILE = (128, 128)


class BlockStats(NamedTuple):
    """What a row of a block adds to the softmax of its token; each (n,), in the dtype of the logits.

    max: of the capped logits; -inf where every column is -inf.
    sum_exp: sum of exp(logit - max); 0 where max is -inf.
    picked: the capped logit of the label where the label lies in the block, else 0.
    total: sum of class weight x capped logit; None unless it was asked for.
    """

    max: torch.Tensor
    sum_exp: torch.Tensor
    picked: torch.Tensor
    total: torch.Tensor | None


class RowScales(NamedTuple):
    """Factors of a token in its gradient; each (n,), in the dtype of the logits; 0 in the rows of ignored tokens.

        g[c] = softmax p[c] - label [c = y] - smooth w[c]

    smooth: None means 0 in every row.
    """

    softmax: torch.Tensor
    label: torch.Tensor
    smooth: torch.Tensor | None


def block_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    first: int,
    softcap: float | None,
    class_weight: torch.Tensor | None = None,
    want_total: bool = False,
) -> BlockStats:
    """Statistics of a block; adds the bias and applies the softcap (cap tanh(z / cap)) to `logits` in place.

    Args:
        logits: (n, v) products of hidden states and weight rows, fp32 or fp64, contiguous. Overwritten.
        labels: (n,) int64, columns of the whole vocabulary. An ignored row holds -1, which lies in no block.
        bias: (v,), the slice of this block, any float dtype; added in the dtype of the logits.
        first: the block's first column in the whole vocabulary.
        softcap: cap > 0, or None.
        class_weight: (v,), the slice of this block; enters `total` only.
        want_total: whether label smoothing needs `total`.

    Returns:
        BlockStats; n or v may be 0.
    """
    cap_(logits, bias, softcap)
    total = None
    if want_total:
        total = logits.sum(-1) if class_weight is None else logits @ class_weight.to(logits.dtype)
    if logits.shape[1] == 0:
        zeros = logits.new_zeros(logits.shape[0])
        return BlockStats(torch.full_like(zeros, -torch.inf), zeros, zeros, total)
    largest = logits.amax(-1)
    # exp(-inf - -inf) is nan: a block whose every column is -inf adds nothing.
    anchor = largest.masked_fill(largest == -torch.inf, 0.0)
    sum_exp = (logits - anchor[:, None]).exp_().sum(-1)
    inside, columns = _columns(labels, first, logits.shape[1])
    picked = torch.where(inside, logits.gather(1, columns[:, None])[:, 0], 0.0)
    return BlockStats(largest, sum_exp, picked, total)


def cap_(logits: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> None:
    """The first part of `block_stats` alone: bias and softcap, in place."""
    if bias is not None:
        logits.add_(bias.to(logits.dtype))
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def block_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    scales: RowScales,
    *,
    first: int,
    softcap: float | None,
    class_weight: torch.Tensor | None = None,
    filter_eps: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Gradient with respect to the raw logits (before softcap and bias), of logits that `block_stats` has capped.

        (softmax exp(z - LSE) - label [c = y] - smooth w[c]) (1 - (z / cap)^2)

    The label's term is taken off in the dtype of the logits, before any rounding: p - 1 of a certain token cancels.
    Rows whose softmax factor is 0 and whose label is -1 are exactly 0, whatever their logits are.

    Args:
        logits: (n, v) as `block_stats` leaves them, contiguous. Overwritten: by the gradient, or where `out` is given
            by anything.
        labels: (n,) int64 as in `block_stats`; -1 marks an ignored row.
        lse: (n,) log of the sum of exp over the whole vocabulary, in the dtype of the logits.
        scales: factors of every row.
        first, softcap: as in `block_stats`.
        class_weight: (v,), the slice of this block; read where scales.smooth is given.
        filter_eps: drop (set to 0) every tile of FILTER_TILE in which no |gradient| reaches this. None keeps all.
        out: (n, v) contiguous, where the gradient goes, rounded to its dtype; None means into `logits`.

    Returns:
        bool (ceil(n / 128), ceil(v / 128)), the tiles that were kept; None without filter_eps.
    """
    dead = (labels < 0) & (scales.softmax == 0)
    slope = None if softcap is None else 1.0 - (logits / softcap).square_()
    gradient = logits.sub_(lse[:, None]).exp_().mul_(scales.softmax[:, None])
    inside, columns = _columns(labels, first, logits.shape[1])
    if logits.shape[1] > 0:
        rows = torch.arange(logits.shape[0], device=logits.device)
        gradient[rows, columns] -= torch.where(inside, scales.label, 0.0)
    if scales.smooth is not None:
        if class_weight is None:
            gradient.sub_(scales.smooth[:, None])
        else:
            gradient.addr_(scales.smooth, class_weight.to(gradient.dtype), alpha=-1)
    if slope is not None:
        gradient.mul_(slope)
    gradient.masked_fill_(dead[:, None], 0.0)
    kept = None if filter_eps is None else _filter_(gradient, filter_eps)
    if out is not None:
        out.copy_(gradient)
    return kept


def _columns(labels: torch.Tensor, first: int, num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which labels lie in the block, and their columns in it (0 where they do not)."""
    columns = labels - first
    inside = (labels >= 0) & (columns >= 0) & (columns < num_columns)
    return inside, torch.where(inside, columns, 0)


def _filter_(gradient: torch.Tensor, eps: float) -> torch.Tensor:
    """Zero the tiles below eps; the tiles that were kept."""
    num_rows, num_columns = (-(-size // tile) for size, tile in zip(gradient.shape, FILTER_TILE, strict=True))
    kept = torch.zeros(num_rows, num_columns, dtype=torch.bool, device=gradient.device)
    for i, rows in enumerate(gradient.split(FILTER_TILE[0])):
        for j, tile in enumerate(rows.split(FILTER_TILE[1], dim=1)):
            # A nan is below nothing: its tile stays.
            kept[i, j] = ~(tile.abs() < eps).all()
            tile.mul_(kept[i, j])
    return kept
