"""First weights of a run: the model on meta, its shards on the device, then tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

from headrace.kernels.api import Operators
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.model.decoder import Decoder, initial_weights
from headrace.workers.model.hf import iter_weights
from headrace.workers.model.lora import is_adapter
from headrace.workers.model.peft_files import iter_adapter
from headrace.workers.model.sharded import copy_weights
from headrace.workers.train.config import TrainConfig


def build_model(config: ModelConfig, train: TrainConfig | None = None, adapter: AdapterConfig = NO_ADAPTER) -> Decoder:
    """The decoder of a job on the meta device, fp32, with its adapters and the operators that `train` names."""
    train = TrainConfig() if train is None else train
    operators = Operators(attention=train.attention, kernels=train.kernels)
    return Decoder(config, dtype=torch.float32, device="meta", operators=operators, adapter=adapter)


def fill_weights(
    model: nn.Module,
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device,
    on_device: bool = False,
    adapter: AdapterConfig = NO_ADAPTER,
) -> None:
    """Give a sharded model on meta its memory and its first weights: those of `init_from` folders, or random ones.

    One whole tensor is in memory at a time; every rank keeps its part of it, and of a pipeline that of its stages.

    Args:
        on_device: draw random weights there. The CPU draws the same ones for every device, but takes minutes for 7B.

    Raises:
        InputError: a folder does not hold this model or this adapter; names file and tensor.
    """
    model.to_empty(device=device)
    given: list[Iterator[tuple[str, torch.Tensor]]] = []
    if config.init_from is not None:
        given.append(iter_weights(config.init_from, config))
    if adapter.init_from is not None:
        given.append(iter_adapter(adapter.init_from, config, adapter))

    own = {name for name, _ in model.named_parameters()}

    def is_drawn(name: str) -> bool:
        return name in own and (adapter if is_adapter(name) else config).init_from is None

    where = device if on_device else torch.device("cpu")
    read = ((name, tensor) for name, tensor in chain(*given) if name in own)
    copy_weights(model, chain(read, initial_weights(config, seed, where, adapter, wanted=is_drawn)))
