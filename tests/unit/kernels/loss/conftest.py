"""The loss from logits in plain fp64 torch, and what the loss head's tests compare with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

Loss = Callable[..., Any]


def from_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    class_weight: torch.Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_valid: float | None = None,
    return_lse: bool = False,
) -> Any:
    """F.cross_entropy on the whole matrix of logits, z-loss added; shift is the caller's."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(-1)
    flat = logits.flatten(0, -2), targets.flatten()
    options = {"weight": class_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    loss = F.cross_entropy(*flat, reduction="none", **options).view(targets.shape)
    valid = targets != ignore_index
    loss = loss + z_loss * lse.square() * valid
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        default = valid.sum() if class_weight is None else class_weight[targets[valid]].sum()
        loss = loss / (num_valid or default.clamp_min(1))
    return (loss, lse) if return_lse else loss


def outcome(loss: Loss, leaves: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Outputs, and the gradients of hidden, weight (and bias) for drawn upstream gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if len(leaves) == 3:
        options["bias"] = leaves[2]
    out = loss(leaves[0], leaves[1], **options)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outs]
    return [o.detach() for o in outs] + list(torch.autograd.grad(outs, leaves, upstream))


@pytest.fixture(scope="session")
def oracle() -> Loss:
    """The loss from the whole matrix of logits."""
    return from_logits


@pytest.fixture(scope="session")
def run() -> Callable[..., list[torch.Tensor]]:
    """run(loss, leaves, **options): outputs and gradients."""
    return outcome
