"""SiLU, GELU and SwiGLU with an exact forward that keep 4-bit codes, and nothing else, for backward.

The idea is S2A's (arXiv 2503.08154); `derivative.py` explains the codes and their grid. The codes pass
through save_for_backward: saved-tensor hooks see and may move them, and a second backward is refused by autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from headrace.kernels.backend import Backend
from headrace.kernels.codecs.activations import Activation, apply
from headrace.kernels.codecs.config import GROUP_SIZE, Rounding
from headrace.kernels.codecs.derivative import FourBitDerivative, FourBitSwiGLU
from headrace.kernels.codecs.interface import check_encode
from headrace.kernels.reference.activation import swiglu


class _Activation(torch.autograd.Function):
    """f(x), exact; backward reads the codes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codec: FourBitDerivative, seed: int, backend: Backend) -> torch.Tensor:
        encoded = codec.encode(x, seed=seed, backend=backend)
        ctx.save_for_backward(*encoded.payload)
        ctx.codec, ctx.backend, ctx.emptied = codec, backend, encoded.with_payload(())
        return apply(x, codec.activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        encoded = ctx.emptied.with_payload(ctx.saved_tensors)
        return ctx.codec.backward(encoded, grad, backend=ctx.backend), None, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, exact; backward reads the two codes."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, codec: FourBitSwiGLU, seed: int, backend: Backend
    ) -> torch.Tensor:
        encoded = codec.encode(gate, up, seed=seed, backend=backend)
        ctx.save_for_backward(*encoded[0].payload, *encoded[1].payload)
        ctx.codec, ctx.backend = codec, backend
        ctx.emptied = tuple(one.with_payload(()) for one in encoded)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        saved = ctx.saved_tensors
        encoded = (ctx.emptied[0].with_payload(saved[:2]), ctx.emptied[1].with_payload(saved[2:]))
        for_gate, for_up = ctx.codec.backward(encoded, grad, backend=ctx.backend)
        return for_gate, for_up, None, None, None


def silu_s2a(
    x: torch.Tensor,
    *,
    seed: int,
    rounding: Rounding = Rounding.stochastic,
    check_finite: bool = True,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """silu(x), exact, keeping half a byte per element for backward: a 4-bit code of silu'(x).

    Args:
        x: any shape; fp32, bf16 or fp16.
        seed: 0 <= seed < 2^63, different for every call (`derive_seed`).
        check_finite: see FourBitDerivative.
        backend: who encodes and decodes; the forward is torch's own.

    Raises:
        ValueError: see Codec.encode.
        RuntimeError: a second backward.
    """
    return _with_codec(x, FourBitDerivative(Activation.silu, rounding, check_finite), seed, backend)


def gelu_s2a(
    x: torch.Tensor,
    *,
    seed: int,
    approximate: str = "none",
    rounding: Rounding = Rounding.stochastic,
    check_finite: bool = True,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """gelu(x), exact, keeping half a byte per element for backward: a 4-bit code of gelu'(x).

    Args:
        approximate: "none" (by erf) or "tanh", as torch.nn.functional.gelu has it.
        Others and errors: see `silu_s2a`.

    Raises:
        ValueError: also for another `approximate`.
    """
    names = {"none": Activation.gelu_erf, "tanh": Activation.gelu_tanh}
    if approximate not in names:
        raise ValueError(f"approximate={approximate!r}: one of {', '.join(names)}")
    return _with_codec(x, FourBitDerivative(names[approximate], rounding, check_finite), seed, backend)


def _with_codec(x: torch.Tensor, codec: FourBitDerivative, seed: int, backend: Backend) -> torch.Tensor:
    check_encode(codec.name, x, seed, 0)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return apply(x, codec.activation)
    return _Activation.apply(x, codec, seed, backend)


def swiglu_s2a(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    seed: int,
    rounding: Rounding = Rounding.stochastic,
    group_size: int = GROUP_SIZE,
    check_finite: bool = True,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """silu(gate) * up, exact, keeping 1 + 16 / group_size bytes per element for backward; see FourBitSwiGLU.

    Args:
        gate, up: (..., D) of one shape, dtype (fp32, bf16, fp16) and device.
        group_size: neighbours that share a range; a power of two from 16 to 1024.
        Others: see `silu_s2a`.

    Raises:
        ValueError: shapes, dtypes or devices that differ, the group size; see Codec.encode.
        RuntimeError: a second backward.
    """
    codec = FourBitSwiGLU(rounding, check_finite, group_size)
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return swiglu(gate, up)
    return _SwiGLU.apply(gate, up, codec, seed, backend)
