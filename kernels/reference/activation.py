"""Gated linear units (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

GeluForm = Literal["tanh", "none"]
silu_backward = torch.ops.aten.silu_backward.default


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise; any shape, in the inputs' dtype."""
    return F.silu(gate) * up


def swiglu_backward(d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up; every product is rounded to the inputs' dtype, as autograd does."""
    return silu_backward(d_out * up, gate), F.silu(gate).mul_(d_out)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximate: GeluForm = "tanh") -> torch.Tensor:
    """gelu(gate) * up, elementwise; any shape, in the inputs' dtype.

    gelu(g) = g Phi(g) (Hendrycks and Gimpel 2016, arXiv 1606.08415) for approximate "none"; for "tanh", as Gemma has
    it, Phi(g) is (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2.
    """
    return F.gelu(gate, approximate=approximate) * up
