"""Copies whole tensors into a model that may be sharded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def copy_weights(model: nn.Module, source: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy whole tensors into a (sharded) model, each rank its part."""
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, whole in source:
            copy_part(params[name], whole)


def copy_part(param: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of a whole tensor into a parameter."""
    if not isinstance(param, DTensor):
        param.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    part = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, shape, strict=True))]
    param.to_local().copy_(part)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lying_like(part: torch.Tensor | None, param: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of a tensor as that which lies over the ranks as a parameter does; None as it is."""
    if part is None or not isinstance(param, DTensor):
        return part
    mesh, placements = param.device_mesh, param.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())
