"""RMSNorm, with or without the residual sum before it: the plain form or the fused one, by name."""

from __future__ import annotations

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.reference import norm as reference
from headrace.kernels.reference.norm import NormCasting, inverse_rms, widened


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting = NormCasting.llama,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    The fused form reads x once and keeps one fp32 per row for backward, beside x. Its backward is deterministic: every
    program sums the weight's gradient over its own rows, and one sum adds the programs. A non-contiguous x is copied.

    Args:
        x: (..., H). weight: (H,), in the dtype and on the device of x. eps: at least 0.
        casting: where the result is rounded, and whether the weight is stored less one; see NormCasting.

    Returns:
        (..., H), in the dtype of x.

    Raises:
        ValueError: shape, dtype or device of the weight, a negative eps, or a backend that cannot compute this.
    """
    check_norm("rms_norm", x, weight, eps)
    if choose("rms_norm", backend, x.device, x.dtype).got is Backend.triton:
        from headrace.kernels.fused.norm import fused_rms_norm

        return fused_rms_norm(x, weight, eps, casting=casting)
    return reference.rms_norm(x, weight, eps, casting=casting)


def rms_norm_scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting = NormCasting.llama,
    backend: Backend = Backend.auto,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm, without a graph, and 1 / sqrt(mean(x^2) + eps) of every row, which rms_norm_backward may be given.

    Returns:
        y as rms_norm; the scale, (..., 1) in fp32 (fp64 for fp64).

    Raises:
        ValueError: as rms_norm.
    """
    check_norm("rms_norm_scaled", x, weight, eps)
    if choose("rms_norm", backend, x.device, x.dtype).got is Backend.triton:
        from headrace.kernels.fused.norm import fused_rms_norm_scaled

        return fused_rms_norm_scaled(x, weight, eps, casting=casting)
    return reference.rms_norm_scaled(x, weight, eps, casting=casting)


def rms_norm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting = NormCasting.llama,
    backend: Backend = Backend.auto,
    of_weight: bool = True,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of rms_norm from its input, without a graph: see reference/norm.py for the formula.

    Args:
        d_out: (..., H), of the result. of_weight: whether the weight's gradient is wanted. scale: as rms_norm_scaled
            returns it; None: it is computed. Others as rms_norm.

    Returns:
        Of x, in its dtype; of the weight, (H,) in fp32 (fp64 for fp64), or None.

    Raises:
        ValueError: as rms_norm.
    """
    check_norm("rms_norm_backward", x, weight, eps)
    if choose("rms_norm", backend, x.device, x.dtype).got is Backend.triton:
        from headrace.kernels.fused.norm import fused_rms_norm_backward

        d_x, d_weight = fused_rms_norm_backward(d_out, x, weight, eps, casting=casting, scale=scale)
        return d_x, d_weight if of_weight else None
    scale = inverse_rms(widened(x), eps) if scale is None else scale
    return reference.rms_norm_backward(d_out, x, weight, scale, casting=casting, of_weight=of_weight)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    casting: NormCasting = NormCasting.llama,
    backend: Backend = Backend.auto,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s = x + residual and rms_norm(s), in one pass; backward takes the cotangents of both.

    s is rounded to the inputs' dtype before it is normed, so that both results belong to the same numbers. The fused
    form keeps s (which it returns) and one fp32 per row; x and residual are not kept. Non-contiguous inputs are copied.

    Args:
        x, residual: (..., H), same shape, dtype and device. weight, eps, casting: see rms_norm.

    Returns:
        The normed sum and the sum, (..., H) each, in the dtype of x.

    Raises:
        ValueError: see rms_norm, and shape, dtype or device of the residual.
    """
    check_norm("add_rms_norm", x, weight, eps)
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"add_rms_norm: residual {_described(residual)}: expected as x, {_described(x)}")
    if choose("add_rms_norm", backend, x.device, x.dtype).got is Backend.triton:
        from headrace.kernels.fused.norm import fused_add_rms_norm

        return fused_add_rms_norm(x, residual, weight, eps, casting=casting)
    return reference.add_rms_norm(x, residual, weight, eps, casting=casting)


def check_norm(op: str, x: torch.Tensor, weight: torch.Tensor, eps: float, *, name: str = "weight") -> None:
    """Raises ValueError, naming the argument, unless weight is (H,), like x, and eps at least 0."""
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x {tuple(x.shape)}: expected (..., H), H at least 1")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} {tuple(weight.shape)}: expected (H,) where x is {tuple(x.shape)} = (..., H)")
    if (weight.dtype, weight.device) != (x.dtype, x.device):
        raise ValueError(f"{op}: {name} {_described(weight)}: expected {x.dtype} on {x.device}, as x")
    if not eps >= 0:
        raise ValueError(f"{op}: eps={eps}: at least 0")


def _described(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
