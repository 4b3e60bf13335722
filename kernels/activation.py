"""Gated linear units: the plain form or the fused one, by name."""

from __future__ import annotations

from typing import get_args

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.reference import activation as reference
from headrace.kernels.reference.activation import GeluForm


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend = Backend.auto) -> torch.Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv 2002.05202).

    The fused form computes in fp32, rounds once, and keeps gate and up alone: backward makes the activation again. The
    halves of a joint projection are read through their row stride; other non-contiguous inputs are copied.

    Args:
        gate, up: (..., H), same shape, dtype and device.

    Returns:
        (..., H), in the dtype of gate.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or a backend that cannot compute this.
    """
    _check("swiglu", gate, up)
    if choose("swiglu", backend, gate.device, gate.dtype).got is Backend.triton:
        from headrace.kernels.fused.activation import fused_swiglu

        return fused_swiglu(gate, up)
    return reference.swiglu(gate, up)


def swiglu_backward(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, backend: Backend = Backend.auto
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of swiglu's gate and up from their values, without a graph. d_out: like gate; others as swiglu."""
    _check("swiglu_backward", gate, up)
    if choose("swiglu", backend, gate.device, gate.dtype).got is Backend.triton:
        from headrace.kernels.fused.activation import fused_swiglu_backward

        return fused_swiglu_backward(d_out, gate, up)
    return reference.swiglu_backward(d_out, gate, up)


def geglu(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: GeluForm = "tanh", backend: Backend = Backend.auto
) -> torch.Tensor:
    """gelu(gate) * up, elementwise; see swiglu for what the fused form keeps and reads.

    Args:
        gate, up: (..., H), same shape, dtype and device.
        approximate: "tanh", as Gemma has it, or "none", the error function. The fused form writes both out from exp:
            the error function to 1.5e-7 (Abramowitz and Stegun 7.1.26).

    Returns:
        (..., H), in the dtype of gate.

    Raises:
        ValueError: see swiglu, and an unknown `approximate`.
    """
    _check("geglu", gate, up)
    if approximate not in get_args(GeluForm):
        raise ValueError(f"geglu: approximate={approximate!r}: one of {', '.join(get_args(GeluForm))}")
    if choose("geglu", backend, gate.device, gate.dtype).got is Backend.triton:
        from headrace.kernels.fused.activation import fused_geglu

        return fused_geglu(gate, up, approximate=approximate)
    return reference.geglu(gate, up, approximate=approximate)


def _check(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        got, expected = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (up, gate))
        raise ValueError(f"{op}: up {got}: expected {expected}, as gate")
