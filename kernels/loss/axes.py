"""The two ways through the logits: along the tokens with gradients in forward, along the vocabulary with recompute.

Every function runs without autograd, on hidden (N, D), weight (V, D) of this rank and bias (V,) or None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from headrace.kernels.loss.narrowing import scaled_
from headrace.kernels.loss.problem import Gradients, Problem
from headrace.kernels.loss.steps import BlockStats
from headrace.kernels.merge import merge_max_sum
from headrace.kernels.products import add_product_, product

# Of hidden, weight and bias.
Wanted = tuple[bool, bool, bool]
# Rows of the input gradient that are scaled at a time.
SCALE_ROWS = 1024


class Upstream(NamedTuple):
    """What backward is given, for the M scored tokens.

    lse: (M,) of forward. of_loss, of_lse: (M,) upstream gradients of loss and LSE over `factor`, so that the largest
    is 1 and products in a narrow dtype do not underflow; of_lse None is 0. factor: scalar, wide.
    """

    lse: torch.Tensor
    of_loss: torch.Tensor
    of_lse: torch.Tensor | None
    factor: torch.Tensor


def normalise(
    problem: Problem, lse: torch.Tensor, of_loss: torch.Tensor | None, of_lse: torch.Tensor | None
) -> Upstream:
    """Upstream gradients (N,) of loss and LSE, each None for 0, to those of the scored tokens over their largest."""
    present = [tensor for tensor in (of_loss, of_lse) if tensor is not None]
    factor = torch.ones((), dtype=problem.dtypes.wide, device=lse.device)
    if present and problem.num_tokens > 0:
        factor = torch.stack([tensor.abs().amax() for tensor in present]).amax()
        factor = torch.where((factor > 0) & factor.isfinite(), factor, 1.0)
    if of_loss is None:
        of_loss = torch.zeros(problem.num_tokens, dtype=lse.dtype, device=lse.device)
    rows = slice(None) if problem.rows is None else problem.rows
    return Upstream(lse, of_loss[rows] / factor, None if of_lse is None else of_lse[rows] / factor, factor)


def sweep_tokens(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Wanted
) -> tuple[torch.Tensor, Gradients]:
    """Sum of the losses, in the wide dtype, and its gradients: of hidden in its dtype, of the others as sums."""
    # Summed in fp64: a million token losses in fp32 would lose the sixth digit.
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    is_whole = problem.rows is None and all(problem.live)
    make_hidden = torch.empty_like if is_whole else torch.zeros_like
    d_hidden = make_hidden(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=problem.dtypes.sums, device=weight.device) if wanted[1] else None
    d_bias = torch.zeros(weight.shape[0], dtype=problem.dtypes.wide, device=weight.device) if wanted[2] else None
    gradients = Gradients(d_hidden, d_weight, d_bias)
    for chunk in problem.chunks():
        loss += _token_chunk(problem, hidden, weight, bias, chunk, gradients)
    return loss.to(problem.dtypes.wide), gradients


def _token_chunk(
    problem: Problem,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    chunk: slice,
    gradients: Gradients,
) -> torch.Tensor:
    """Loss of one chunk, fp64; adds to the gradients that are there. A function, so that its logits die with it."""
    columns = slice(0, problem.shard.num_rows)
    part = problem.take(hidden, chunk)
    logits, stats = problem.block(part, weight, bias, chunk, columns)
    lse, losses = problem.losses(problem.shard.merge(stats), chunk)
    loss = losses.sum(dtype=torch.float64)
    if all(gradient is None for gradient in gradients):
        return loss
    d_logits = problem.gradient(logits, lse, problem.gradient_scales(chunk, lse), chunk, columns)
    del logits
    if gradients.hidden is not None:
        if problem.shard.group is None:
            d_part = d_logits @ weight
        else:
            d_part = problem.shard.sum_(product(d_logits, weight, problem.dtypes.sums))
        problem.put(gradients.hidden, chunk, d_part)
    if gradients.weight is not None:
        add_product_(gradients.weight, d_logits.t(), part)
    if gradients.bias is not None:
        gradients.bias.add_(d_logits.sum(0, dtype=problem.dtypes.wide))
    return loss


def statistics(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """LSE and loss (M,) of every scored token, in the wide dtype; what the vocabulary axis needs of forward."""
    num_tokens = len(problem.labels)
    lse = torch.zeros(num_tokens, dtype=problem.dtypes.wide, device=hidden.device)
    losses = torch.zeros_like(lse)
    for chunk in problem.chunks():
        part = problem.take(hidden, chunk)
        merged = _empty_stats(problem, chunk)
        for columns in problem.column_slices():
            merged = _merge(merged, problem.block(part, weight, bias, chunk, columns)[1])
        lse[chunk], losses[chunk] = problem.losses(problem.shard.merge(merged), chunk)
    return lse, losses


def recompute(
    problem: Problem,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    upstream: Upstream,
    wanted: Wanted,
) -> Gradients:
    """Gradients along the vocabulary axis: logits made again, slice by slice, from the LSE of forward.

    Of hidden, weight and bias, in the dtypes in which they are handed on. Their parts are added in the same order
    whichever of them are wanted.
    """
    hidden, weight, bias = tensors
    sums, dtypes = problem.dtypes.sums, problem.dtypes
    d_hidden = d_weight = d_bias = None
    if wanted[0]:
        d_hidden = torch.zeros(len(problem.labels), hidden.shape[1], dtype=sums, device=hidden.device)
    if wanted[1]:
        d_weight = torch.zeros(weight.shape, dtype=dtypes.weight_grad, device=weight.device)
    if wanted[2] and bias is not None:
        d_bias = torch.zeros(bias.shape, dtype=dtypes.wide, device=bias.device)
    for columns in problem.column_slices():
        part = None
        if d_weight is not None:
            part = d_weight[columns] if d_weight.dtype is sums else torch.zeros_like(d_weight[columns], dtype=sums)
        bias_part = None if d_bias is None else d_bias[columns]
        for chunk in problem.chunks():
            _add_block(problem, tensors, upstream, (chunk, columns), Gradients(d_hidden, part, bias_part))
        if part is not None and d_weight is not None:
            d_weight[columns] = part.mul_(upstream.factor)
    if d_hidden is not None:
        d_hidden = scaled_(problem.shard.sum_(d_hidden), upstream.factor, hidden.dtype)
        d_hidden = spread(problem, d_hidden)
    if d_bias is not None:
        d_bias = d_bias.mul_(upstream.factor).to(dtypes.bias_grad)
    return Gradients(d_hidden, d_weight, d_bias)


def finish_tokens(problem: Problem, gradients: Gradients, upstream: torch.Tensor) -> Gradients:
    """What `sweep_tokens` made, times the upstream gradient (a scalar in the wide dtype), in the dtypes handed on."""
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        # In the wide dtype, part by part: `upstream` rounded to bf16 would bias every gradient.
        for part in d_hidden.split(SCALE_ROWS):
            part.copy_(part.to(upstream.dtype) * upstream)
    if d_weight is not None:
        d_weight = scaled_(d_weight, upstream, problem.dtypes.weight_grad)
    if d_bias is not None:
        d_bias = d_bias.mul_(upstream).to(problem.dtypes.bias_grad)
    return Gradients(d_hidden, d_weight, d_bias)


def _add_block(
    problem: Problem,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    upstream: Upstream,
    cut: tuple[slice, slice],
    sums: Gradients,
) -> None:
    """Make a block's logits again and add its gradients; sums of hidden (M, D), and of the slice's weight and bias."""
    (hidden, weight, bias), (chunk, columns) = tensors, cut
    part = problem.take(hidden, chunk)
    logits = problem.again(part, weight, bias, chunk, columns)
    lse = upstream.lse[chunk]
    scales = problem.gradient_scales(
        chunk,
        lse,
        upstream.of_loss[chunk],
        None if upstream.of_lse is None else upstream.of_lse[chunk],
    )
    d_logits = problem.gradient(logits, lse, scales, chunk, columns)
    del logits
    if sums.hidden is not None:
        add_product_(sums.hidden[chunk], d_logits, weight[columns])
    if sums.weight is not None:
        add_product_(sums.weight, d_logits.t(), part)
    if sums.bias is not None:
        sums.bias.add_(d_logits.sum(0, dtype=sums.bias.dtype))


def spread(problem: Problem, values: torch.Tensor) -> torch.Tensor:
    """(M, ...) values of the scored tokens to (N, ...), 0 elsewhere."""
    if problem.rows is None:
        return values
    out = values.new_zeros(problem.num_tokens, *values.shape[1:])
    return out.index_copy_(0, problem.rows, values)


def _empty_stats(problem: Problem, chunk: slice) -> BlockStats:
    zeros = torch.zeros(chunk.stop - chunk.start, dtype=problem.dtypes.wide, device=problem.labels.device)
    total = None if problem.scales.smooth is None else zeros
    return BlockStats(torch.full_like(zeros, -torch.inf), zeros, zeros, total)


def _merge(a: BlockStats, b: BlockStats) -> BlockStats:
    """Statistics of disjoint columns to those of both."""
    largest, sum_exp = merge_max_sum(a.max, a.sum_exp, b.max, b.sum_exp)
    total = None if a.total is None or b.total is None else a.total + b.total
    return BlockStats(largest, sum_exp, a.picked + b.picked, total)
