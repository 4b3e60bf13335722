"""Gradients that FSDP2 keeps until the step's last backward reduces them: read and put back, for resume inside a step.

Between two backwards without a reduction, the whole gradient of a parameter waits beside its shard: in the dtype that
is reduced, or as `.grad` of the gathered parameter where that dtype is its own. torch has no public name for them; the
attributes are the same in torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from headrace.workers.model.sharded import local_part, lying_like


def read_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that are there, by names that write_gradients knows."""
    found: dict[str, torch.Tensor | None] = {}
    for name, param in _sharded(model):
        found[f"{name}.sum"] = param.unsharded_accumulated_grad
        found[f"{name}.own"] = param._unsharded_param.grad if hasattr(param, "_unsharded_param") else None
    return {name: local_part(grad) for name, grad in found.items() if grad is not None}


def write_gradients(model: nn.Module, grads: Mapping[str, torch.Tensor]) -> None:
    """Put them back. Every weight has been gathered once: a forward has run.

    Raises:
        ValueError: one has no parameter, or another shape.
    """
    params = dict(_sharded(model))
    for key, grad in grads.items():
        name, _, place = key.rpartition(".")
        if name not in params or local_part(own := params[name]._unsharded_param).shape != grad.shape:
            raise ValueError(f"gradient {key} of shape {tuple(grad.shape)} belongs to no parameter of this model")
        found = lying_like(grad.to(own.device), own)
        if place == "own":
            own.grad = found
        else:
            params[name].unsharded_accumulated_grad = found


def _sharded(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """torch's FSDPParam of every parameter, by number of the module and of the parameter in it."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for number, module in enumerate(modules):
        group = module._get_fsdp_state()._fsdp_param_group
        for index, param in enumerate(() if group is None else group.fsdp_params):
            yield f"{number}.{index}", param
