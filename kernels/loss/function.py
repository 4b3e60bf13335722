"""The two axes as autograd functions. Per-call state only; each backward runs once."""

from __future__ import annotations

from typing import Any

import torch

from headrace.kernels.loss import axes
from headrace.kernels.loss.problem import Gradients, Problem

SPENT = "linear_cross_entropy: backward runs once; compute the loss again"


def tokens_loss(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Sum of the losses; gradients made in forward where any is wanted."""
    if _wants_gradient(hidden, weight, bias):
        return _Tokens.apply(hidden, weight, bias, problem)
    with torch.no_grad():
        return axes.sweep_tokens(problem, hidden, weight, bias, (False, False, False))[0]


def vocabulary_losses(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and LSE (N,) per token, both differentiable; the LSE is 0 where it was not requested and a token ignored."""
    if _wants_gradient(hidden, weight, bias):
        return _Vocabulary.apply(hidden, weight, bias, problem)
    with torch.no_grad():
        lse, losses = axes.statistics(problem, hidden, weight, bias)
        return axes.spread(problem, losses), axes.spread(problem, lse)


def _wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: Problem
    ) -> torch.Tensor:
        loss, gradients = axes.sweep_tokens(problem, hidden, weight, bias, ctx.needs_input_grad[:3])
        ctx.save_for_backward(gradients.hidden)
        # Not a saved tensor: it must go as soon as backward has handed it on.
        ctx.sums = gradients.weight, gradients.bias
        ctx.problem = problem
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        problem = _spend(ctx)
        (d_hidden,) = ctx.saved_tensors
        sums, ctx.sums = ctx.sums, None
        return *axes.finish_tokens(problem, Gradients(d_hidden, *sums), upstream), None


class _Vocabulary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: Problem
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse, losses = axes.statistics(problem, hidden, weight, bias)
        ctx.save_for_backward(hidden, weight, bias, lse)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        # A copy: what was saved must not be the output that a caller may write to.
        return axes.spread(problem, losses), axes.spread(problem, lse.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, of_loss: torch.Tensor | None, of_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        problem = _spend(ctx)
        hidden, weight, bias, lse = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            upstream = axes.normalise(problem, lse, of_loss, of_lse)
            return *axes.recompute(problem, (hidden, weight, bias), upstream, ctx.needs_input_grad[:3]), None


def _spend(ctx: Any) -> Problem:
    problem, ctx.problem = ctx.problem, None
    if problem is None:
        raise RuntimeError(SPENT)
    return problem
