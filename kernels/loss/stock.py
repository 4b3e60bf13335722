"""backend=stock: QuACK's chunked head (package quack-kernels, extra `fa4`), for the plain loss in bf16 on CUDA."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from headrace.kernels.loss.checks import Terms
from headrace.kernels.loss.options import ChunkAxis, LossOptions
from headrace.kernels.loss.problem import IGNORED, Problem

# Its kernels read 16 bytes at a time; its fast path needs chunks of 128 tokens.
MULTIPLE, CHUNK_MULTIPLE = 8, 128


def check(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Terms, options: LossOptions
) -> None:
    """Whether QuACK computes this.

    Raises:
        ValueError: everything that keeps it from doing so.
    """
    found = [*_missing_terms(bias, terms, options), *_missing_shape(hidden, weight)]
    if not hidden.is_cuda:
        found.append(f"the tensors are on {hidden.device}, it needs CUDA")
    if importlib.util.find_spec("quack") is None:
        found.append("it is not installed (pip install quack-kernels)")
    if found:
        raise ValueError(
            f"linear_cross_entropy: backend=stock is QuACK, and {'; '.join(found)}; backend=auto computes this"
        )


def chunk_tokens(vocab_size: int, options: LossOptions) -> int:
    """Tokens per chunk: what was asked for, else what the workspace holds of bf16 logits and their gradient."""
    if options.tokens_per_chunk is not None:
        return options.tokens_per_chunk
    tokens = options.workspace_bytes // (4 * vocab_size)
    return max(tokens // CHUNK_MULTIPLE * CHUNK_MULTIPLE, CHUNK_MULTIPLE)


def loss(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the losses of hidden (N, D) and weight (V, D) by QuACK, fp32, differentiable once; bias is None."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    total = chunked_linear_cross_entropy(
        hidden,
        weight,
        problem.labels,
        chunk_size=problem.cuts.tokens,
        ignore_index=IGNORED,
        reduction="sum",
        # Picks kernels by timing them, so that another run may sum in another order.
        tuned=not problem.options.deterministic,
    )
    return _Once.apply(total)


def _missing_terms(bias: torch.Tensor | None, terms: Terms, options: LossOptions) -> list[str]:
    asked = {
        "bias": bias is not None,
        "softcap": terms.softcap is not None,
        "label_smoothing": terms.label_smoothing > 0,
        "class_weight": terms.class_weight is not None,
        "z_loss": terms.z_loss > 0,
        "reduction='none'": terms.reduction == "none",
        "return_lse": terms.return_lse,
        "group": terms.group is not None,
        "filter_eps": options.filter_eps is not None,
        "axis=vocabulary": options.axis is ChunkAxis.vocabulary,
        f"sum_dtype={options.sum_dtype}": options.sum_dtype not in (None, torch.float32),
    }
    return [f"it has no {name}" for name, is_asked in asked.items() if is_asked]


def _missing_shape(hidden: torch.Tensor, weight: torch.Tensor) -> list[str]:
    found = []
    if hidden.dtype is not torch.bfloat16:
        found.append(f"it takes bf16, not {hidden.dtype}")
    num_tokens = hidden.shape[:-1].numel()
    for name, size in (("tokens", num_tokens), ("vocabulary", weight.shape[0]), ("width", weight.shape[1])):
        if size % MULTIPLE:
            found.append(f"it takes multiples of {MULTIPLE}, not {name} of {size}")
    return found


class _Once(torch.autograd.Function):
    """Identity whose backward runs once: QuACK scales its gradients in place and would scale them twice."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor) -> torch.Tensor:
        ctx.is_spent = False
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        if ctx.is_spent:
            raise RuntimeError("linear_cross_entropy: backward runs once; compute the loss again")
        ctx.is_spent = True
        return upstream
