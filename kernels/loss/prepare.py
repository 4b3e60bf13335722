"""From the arguments of a call to its Problem: labels, factors, cuts, and who computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.loss import steps as plain_steps
from headrace.kernels.loss.checks import Terms, check_labels
from headrace.kernels.loss.options import HeadShape, LossOptions, plan_cuts
from headrace.kernels.loss.problem import IGNORED, Dtypes, Problem, Steps
from headrace.kernels.loss.shards import Shard, find_shard
from headrace.kernels.loss.steps import RowScales


@dataclass(frozen=True)
class Labels:
    """labels: (M,), IGNORED where a token does not count. rows: (M,) their positions, None for all N tokens. num_valid:
    how many count."""

    labels: torch.Tensor
    rows: torch.Tensor | None
    num_valid: int


def prepare(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    options: LossOptions,
    backend: Backend,
) -> Problem:
    """The Problem of a checked call; hidden (N, D), targets (N,) shifted already.

    Raises:
        ValueError: a label beyond the vocabulary, an axis or a backend that cannot do this, unequal ranks.
    """
    shard = replace(find_shard(weight, targets, terms.group), on_sent=options.on_sent)
    if shard.vocab_size == 0:
        raise ValueError(f"weight: shape {tuple(weight.shape)}: expected at least one row")
    labels = _labels(targets, terms, options, shard)
    steps = pick_steps(backend, hidden.device, hidden.dtype)
    dtypes = _dtypes(hidden, weight, bias, options)
    shape = HeadShape(
        num_tokens=max(labels.labels.numel(), 1),
        vocab_size=shard.largest,
        width=hidden.shape[1],
        logit_bytes=_logit_bytes(dtypes, steps, terms.softcap),
        sum_bytes=dtypes.sums.itemsize,
    )
    cuts = plan_cuts(shape, options, in_forward=terms.reduction != "none" and not terms.return_lse)
    class_weight = None if terms.class_weight is None else terms.class_weight.to(dtypes.wide)
    scales = _row_scales(labels.labels, class_weight, terms, shard, dtypes.wide)
    return Problem(
        labels=labels.labels,
        rows=labels.rows,
        num_tokens=hidden.shape[0],
        scales=scales,
        class_weight=class_weight,
        terms=terms,
        options=options,
        shard=shard,
        cuts=cuts,
        steps=steps,
        dtypes=dtypes,
        live=_live(labels, cuts.tokens, terms.return_lse),
        denominator=_denominator(labels, class_weight, terms, shard, dtypes.wide),
    )


def pick_steps(backend: Backend, device: torch.device, dtype: torch.dtype) -> Steps:
    """Who does the elementwise steps; `choose` says who may.

    Raises:
        ValueError: the backend cannot compute this here.
    """
    if choose("linear_cross_entropy", backend, device, dtype).got is Backend.triton:
        from headrace.kernels.fused import loss as fused_steps

        return Steps(fused_steps.block_stats, fused_steps.block_gradient_, None, 0)
    return Steps(plain_steps.block_stats, plain_steps.block_gradient_, plain_steps.cap_, 1)


def shifted(targets: torch.Tensor, shift: int, ignore_index: int) -> torch.Tensor:
    """targets (..., T) such that position t holds target t + shift; the last `shift` positions are ignored."""
    if shift == 0:
        return targets
    moved = torch.full_like(targets, ignore_index)
    moved[..., :-shift] = targets[..., shift:]
    return moved


def _labels(targets: torch.Tensor, terms: Terms, options: LossOptions, shard: Shard) -> Labels:
    targets = targets.to(torch.int64)
    num_valid = check_labels(targets, terms.ignore_index, shard.vocab_size)
    labels = torch.where(targets == terms.ignore_index, IGNORED, targets)
    # A fixed cut is one by position, and every token has an LSE.
    if num_valid == len(labels) or options.tokens_per_chunk is not None or terms.return_lse:
        return Labels(labels, None, num_valid)
    rows = torch.nonzero(labels != IGNORED)[:, 0]
    return Labels(labels[rows], rows, num_valid)


def _live(labels: Labels, tokens: int, every_token: bool) -> tuple[bool, ...]:
    num_tokens = len(labels.labels)
    num_chunks = -(-num_tokens // tokens)
    if every_token or labels.num_valid == num_tokens:
        return (True,) * num_chunks
    counts = labels.labels.new_zeros(num_chunks * tokens, dtype=torch.bool)
    counts[:num_tokens] = labels.labels != IGNORED
    return tuple(counts.view(num_chunks, tokens).any(1).tolist())


def _dtypes(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: LossOptions) -> Dtypes:
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    sums = options.sum_dtype or wide
    # A parameter may take a gradient of another dtype (torch's Tensor.grad_dtype; None takes any): then the sum itself
    # is handed on, never copied down.
    wanted = getattr(weight, "grad_dtype", weight.dtype) if weight.is_leaf else weight.dtype
    weight_grad = sums if wanted in (None, sums) else weight.dtype
    return Dtypes(hidden.dtype, wide, sums, weight_grad, wide if bias is None else bias.dtype)


def _logit_bytes(dtypes: Dtypes, steps: Steps, softcap: float | None) -> int:
    """Per logit of a block: itself, temporaries (one more for the softcap's slope), its gradient where it is narrow."""
    temporaries = steps.num_temporaries * (2 if softcap is not None else 1)
    narrow = 0 if dtypes.inputs is dtypes.wide else dtypes.inputs.itemsize
    return dtypes.wide.itemsize * (1 + temporaries) + narrow


def _row_scales(
    labels: torch.Tensor, class_weight: torch.Tensor | None, terms: Terms, shard: Shard, wide: torch.dtype
) -> RowScales:
    smoothing = terms.label_smoothing
    counts = (labels != IGNORED).to(wide)
    if class_weight is None:
        label_weight, mean_weight = counts, torch.ones((), dtype=wide, device=labels.device)
    else:
        label_weight = label_weights(labels, class_weight, shard)
        mean_weight = shard.sum_(class_weight.sum()) / shard.vocab_size
    label = (1.0 - smoothing) * label_weight
    if smoothing == 0.0:
        return RowScales(label, label, None)
    return RowScales(label + smoothing * mean_weight * counts, label, counts * (smoothing / shard.vocab_size))


def label_weights(labels: torch.Tensor, class_weight: torch.Tensor, shard: Shard) -> torch.Tensor:
    """(M,) class weight of each token's label over all shards, 0 where it does not count."""
    columns = labels - shard.first
    inside = (columns >= 0) & (columns < shard.num_rows) & (labels != IGNORED)
    if shard.num_rows == 0:
        own = class_weight.new_zeros(labels.shape)
    else:
        own = torch.where(inside, class_weight[torch.where(inside, columns, 0)], 0.0)
    return shard.sum_(own)


def _denominator(
    labels: Labels, class_weight: torch.Tensor | None, terms: Terms, shard: Shard, wide: torch.dtype
) -> float | torch.Tensor:
    """num_valid where given, else the count of valid labels, or as torch has it the sum of their class weights; an
    empty batch divides by 1."""
    if terms.num_valid is not None:
        if isinstance(terms.num_valid, torch.Tensor):
            count = terms.num_valid.to(labels.labels.device, wide)
            return torch.where(count == 0, 1.0, count)
        if terms.num_valid == 0 and labels.num_valid > 0:
            raise ValueError(f"num_valid=0: {labels.num_valid} labels here count; expected the count over all ranks")
        return terms.num_valid or 1
    if class_weight is None:
        return max(labels.num_valid, 1)
    total = label_weights(labels.labels, class_weight, shard).sum()
    return torch.where(total == 0, 1.0, total)
