"""Bad input to the loss head: refused with the argument's name, what came and what was expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from headrace.kernels.loss.options import LossOptions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """Arguments of `linear_cross_entropy` beside the tensors that get gradients."""

    ignore_index: int
    softcap: float | None
    shift: int
    label_smoothing: float
    class_weight: torch.Tensor | None
    z_loss: float
    reduction: str
    num_valid: int | float | torch.Tensor | None
    return_lse: bool
    group: dist.ProcessGroup | None


def check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    options: LossOptions,
) -> None:
    """Everything that can be told without reading a tensor.

    Raises:
        ValueError: names the argument.
    """
    _check_tensors(hidden, weight, targets)
    _check_per_class("bias", bias, weight, (weight.dtype, torch.float32))
    _check_per_class("class_weight", terms.class_weight, weight, DTYPES)
    if terms.class_weight is not None and terms.class_weight.requires_grad:
        raise ValueError("class_weight: requires_grad=True, but it gets no gradient; expected class_weight.detach()")
    _check_numbers(terms)
    _check_num_valid(terms, hidden.device)
    wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
    if options.sum_dtype not in (None, wide, hidden.dtype):
        raise ValueError(f"options.sum_dtype={options.sum_dtype}: expected None, {wide} or {hidden.dtype}")


def check_labels(labels: torch.Tensor, ignore_index: int, vocab_size: int) -> int:
    """Labels lie in the vocabulary; one device sync on CUDA.

    Returns:
        The number of labels that count.

    Raises:
        ValueError: names the first label that lies outside, and where.
    """
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= vocab_size))
    num_valid, num_outside = torch.stack((valid.sum(), outside.sum())).tolist()
    if num_outside:
        index = int(outside.reshape(-1).nonzero()[0])
        raise ValueError(
            f"targets: label {int(labels.reshape(-1)[index])} at index {index} (of {labels.numel()}): expected 0 to "
            f"{vocab_size - 1}, or ignore_index={ignore_index}"
        )
    return int(num_valid)


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: {type(tensor).__name__}: expected a tensor")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden: shape {tuple(hidden.shape)}: expected (N, D) or (B, T, D)")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden: {hidden.dtype}: expected fp64, fp32, bf16 or fp16")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}: expected (V, {hidden.shape[-1]}), as hidden is "
            f"{tuple(hidden.shape)}: they do not fit"
        )
    if weight.dtype is not hidden.dtype:
        raise ValueError(f"weight: {weight.dtype}: expected {hidden.dtype}, as hidden")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: shape {tuple(targets.shape)}: expected {tuple(hidden.shape[:-1])}, as hidden is "
            f"{tuple(hidden.shape)}: they do not fit"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets: {targets.dtype}: expected int64 class indices")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: on {tensor.device}: expected {hidden.device}, as hidden")


def _check_per_class(
    name: str, tensor: torch.Tensor | None, weight: torch.Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor is None:
        return
    if tensor.shape != weight.shape[:1]:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}: expected ({weight.shape[0]},), one per row of weight")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype}: expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if tensor.device != weight.device:
        raise ValueError(f"{name}: on {tensor.device}: expected {weight.device}, as weight")


def _check_numbers(terms: Terms) -> None:
    if terms.softcap is not None and not (math.isfinite(terms.softcap) and terms.softcap > 0):
        raise ValueError(f"softcap={terms.softcap}: expected a finite number above 0, or None")
    if not 0.0 <= terms.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={terms.label_smoothing}: expected 0 to 1")
    if not (math.isfinite(terms.z_loss) and terms.z_loss >= 0):
        raise ValueError(f"z_loss={terms.z_loss}: expected a finite number, 0 or above")
    if terms.shift < 0:
        raise ValueError(f"shift={terms.shift}: expected 0 or above; position t is scored against target t + shift")
    if terms.reduction not in REDUCTIONS:
        raise ValueError(f"reduction={terms.reduction!r}: expected one of {', '.join(REDUCTIONS)}")


def _check_num_valid(terms: Terms, device: torch.device) -> None:
    num_valid = terms.num_valid
    if num_valid is None:
        return
    if terms.reduction != "mean":
        raise ValueError(f"num_valid={num_valid}: it divides reduction='mean', not reduction={terms.reduction!r}")
    if isinstance(num_valid, torch.Tensor):
        if num_valid.dim() != 0 or num_valid.requires_grad or num_valid.device.type not in ("cpu", device.type):
            raise ValueError(
                f"num_valid: shape {tuple(num_valid.shape)} on {num_valid.device}, requires_grad="
                f"{num_valid.requires_grad}: expected a scalar on {device} without a gradient"
            )
    elif not (math.isfinite(num_valid) and num_valid >= 0):
        raise ValueError(f"num_valid={num_valid}: expected a finite count, 0 or above")
