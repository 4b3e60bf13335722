"""linear_cross_entropy: hidden states and classifier in, loss out, no matrix of tokens by vocabulary in between.

Liger (arXiv 2410.10989) makes gradients in forward, Cut Cross-Entropy (arXiv 2411.09009) recomputes logits in backward;
both are here behind one function, which picks by shape (options.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from headrace.kernels.backend import Backend
from headrace.kernels.loss import stock
from headrace.kernels.loss.checks import Terms, check
from headrace.kernels.loss.function import tokens_loss, vocabulary_losses
from headrace.kernels.loss.options import IGNORED_TARGET, ChunkAxis, LossOptions
from headrace.kernels.loss.prepare import prepare, shifted
from headrace.kernels.loss.problem import Problem
from headrace.kernels.loss.sharded import full_weight, is_dtensor

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
DEFAULT_OPTIONS = LossOptions()


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = IGNORED_TARGET,
    softcap: float | None = None,
    shift: int = 0,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_valid: float | torch.Tensor | None = None,
    return_lse: bool = False,
    group: dist.ProcessGroup | None = None,
    options: LossOptions = DEFAULT_OPTIONS,
    backend: Backend = Backend.auto,
) -> torch.Tensor | Any:
    """Cross-entropy of softcap(hidden weight^T + bias) against targets, as torch's F.cross_entropy defines it.

        loss = LSE - z[y], z = cap tanh((W h + b) / cap)

    plus label smoothing and class weights (steps.py has the formula) and z_loss LSE^2 per token that counts. Logits,
    softmax and the sums of both gradients are fp32 (fp64 for fp64 inputs). Deterministic: nothing uses atomics.
    Backward runs once. On CUDA one device sync checks the labels.

    Args:
        hidden: (N, D) or (B, T, D), fp64, fp32, bf16 or fp16. weight: (V, D), same dtype; a DTensor is gathered
            (LossOptions.weight_sum). With `group`: this rank's rows of the vocabulary, consecutive in rank order,
            of any number, also none; hidden and targets are the same on all its ranks, the gradient of hidden is the
            whole one on each.
        targets: (N,) or (B, T) int64, columns of the whole vocabulary, or ignore_index.
        bias: (V,), dtype of weight or fp32. class_weight: (V,), no gradient. Both are sharded as weight is.
        softcap: cap > 0.
        shift: position t is scored against target t + shift along the last dim; the last `shift` do not count.
        label_smoothing: 0 to 1, spread over the whole vocabulary.
        z_loss: factor of LSE^2 (LSE after softcap).
        reduction: "mean", "sum" or "none" (shape of targets, 0 where a token does not count; minus the log-prob of the
            label where nothing else is asked for).
        num_valid: divides "mean": the count over all ranks and micro-batches. None: the labels here that count, or with
            class_weight the sum of their weights. Where nothing counts the loss is 0, and so are the gradients.
        return_lse: also the LSE of every position, ignored ones too, shape of targets, with its gradient.
        group: process group over which the vocabulary is sharded.
        options: cuts, workspace, filtering. backend: who computes; `stock` is QuACK (bf16 on CUDA, plain loss only).

    Returns:
        loss, scalar or shape of targets; or (loss, lse). fp32, fp64 for fp64 inputs.

    Raises:
        ValueError: names the argument, what came and what was expected.
        RuntimeError: a second backward.
    """
    terms = Terms(
        ignore_index, softcap, shift, label_smoothing, class_weight, z_loss, reduction, num_valid, return_lse, group
    )
    problem, tensors = _begin(hidden, weight, targets, bias, terms, options, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        if problem.cuts.axis is ChunkAxis.tokens:
            sum_losses = stock.loss if backend is Backend.stock else tokens_loss
            total = sum_losses(problem, *tensors)
            return total if reduction == "sum" else total / problem.denominator
        losses, lse = vocabulary_losses(problem, *tensors)
        loss = _reduced(problem, losses).reshape(targets.shape if reduction == "none" else ())
    return (loss, lse.reshape(targets.shape)) if return_lse else loss


def _reduced(problem: Problem, losses: torch.Tensor) -> torch.Tensor:
    """Losses (N,) to the result of the reduction; the sum is taken in fp64."""
    if problem.terms.reduction == "none":
        return losses
    total = losses.sum(dtype=torch.float64).to(losses.dtype)
    return total if problem.terms.reduction == "sum" else total / problem.denominator


def _begin(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    options: LossOptions,
    backend: Backend,
) -> tuple[Problem, Tensors]:
    """Check, gather, flatten and cut."""
    hidden, weight, bias, terms = _gathered(hidden, weight, targets, bias, terms, options)
    check(hidden, weight, targets, bias, terms, options)
    if backend is Backend.stock:
        stock.check(hidden, weight, bias, terms, options)
        options = replace(options, axis=ChunkAxis.tokens, tokens_per_chunk=stock.chunk_tokens(weight.shape[0], options))
    labels = shifted(targets, terms.shift, terms.ignore_index).reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return prepare(hidden, weight, labels, bias, terms, options, backend), (hidden, weight, bias)


def _gathered(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Terms]:
    """Full tensors for DTensors, and under autocast its dtype for hidden and weight."""
    for name, tensor in (("hidden", hidden), ("targets", targets), ("class_weight", terms.class_weight)):
        if is_dtensor(tensor):
            raise ValueError(f"{name}: a DTensor: expected this rank's plain tensor")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if is_dtensor(tensor) and terms.group is not None:
            raise ValueError(f"{name}: a DTensor, with group: expected this rank's rows as a plain tensor")
    if is_dtensor(weight):
        weight = full_weight(weight, targets, options.weight_sum)
    if bias is not None and is_dtensor(bias):
        bias = full_weight(bias, targets, options.weight_sum)
    if isinstance(hidden, torch.Tensor) and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden, weight, bias, terms
