"""Linear layer and cross-entropy in one, tile by tile along the tokens: the logits of one tile exist at a time.

Liger (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009) describe the idea.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORED_TARGET = -100


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, tile: int = 1024
) -> torch.Tensor:
    """Sum over tokens of logsumexp(W h) - (W h)[target].

    Gradients are made tile by tile in the forward pass, while the tile's logits are there, and only scaled in backward:
    no product is taken twice. So backward runs once. Logits, softmax and the weight gradient are fp32 for fp32 and bf16
    inputs, fp64 for fp64. Deterministic; another tile is another order of summation.

    Args:
        hidden: (..., H). weight: (V, H), same dtype. targets: (...) int64; -100 is ignored.
        tile: tokens per tile.

    Returns:
        Scalar, fp32 (fp64 for fp64 input). 0 where no target counts.

    Raises:
        ValueError: tile below 1, or shapes that do not fit.
    """
    if tile < 1:
        raise ValueError(f"tile={tile}: at least 1")
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} do not fit"
        )
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets, tile)
    with torch.no_grad():
        loss, _, _ = _tiles(hidden, weight, targets, tile, wanted=(False, False))
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tile: int) -> torch.Tensor:
        loss, d_hidden, d_weight = _tiles(hidden, weight, targets, tile, wanted=ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_hidden)
        ctx.d_weight, ctx.weight_dtype, ctx.tile, ctx.is_spent = d_weight, weight.dtype, tile, False
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.is_spent:
            raise RuntimeError("linear_cross_entropy: backward runs once; compute the loss again")
        (d_hidden,) = ctx.saved_tensors
        d_weight, ctx.d_weight, ctx.is_spent = ctx.d_weight, None, True
        if d_hidden is not None:
            # In fp32, part by part: `grad` rounded to bf16 would bias every gradient.
            for part in d_hidden.split(ctx.tile):
                part.copy_(part.to(grad.dtype) * grad)
        if d_weight is not None:
            d_weight = d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None


def _tiles(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tile: int, *, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss, and the gradients of the loss that are wanted: of hidden in its dtype, of weight in the wide dtype."""
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    # Summed in fp64: a million token losses in fp32 would lose the sixth digit.
    loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    for begin in range(0, hidden.shape[0], tile):
        rows = slice(begin, begin + tile)
        counts = targets[rows] != IGNORED_TARGET
        labels = torch.where(counts, targets[rows], 0)
        logits = _product(hidden[rows], weight.t(), wide)
        lse = logits.logsumexp(-1)
        picked = logits.gather(1, labels[:, None])[:, 0]
        loss += torch.where(counts, lse - picked, 0.0).sum(dtype=torch.float64)
        if d_hidden is None and d_weight is None:
            continue
        # d loss / d logits = softmax - onehot, made in place of the logits.
        logits.sub_(lse[:, None]).exp_()
        logits[torch.arange(len(labels), device=labels.device), labels] -= 1.0
        d_logits = logits.mul_(counts[:, None]).to(hidden.dtype)
        if d_hidden is not None:
            d_hidden[rows] = d_logits @ weight
        if d_weight is not None:
            d_weight += _product(d_logits.t(), hidden[rows], wide)
    return loss.to(wide), d_hidden, d_weight


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b, summed and returned in `dtype`."""
    if a.dtype is dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
