"""First weights of a run: the model on meta, its shards on the device, then tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder


def build_model(config: ModelConfig) -> nn.Module:
    """The decoder of a job on the meta device, fp32."""
    return Decoder(config, dtype=torch.float32, device="meta")


def fill_weights(model: nn.Module, config: ModelConfig, *, seed: int, device: torch.device) -> None:
    """Give a sharded model on meta its memory and its first weights."""
    model.to_empty(device=device)
    whole = Decoder(config, dtype=torch.float32, device="cpu")
    whole.init_weights(seed)
    copy_weights(model, whole.named_parameters())


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
