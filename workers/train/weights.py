"""First weights of a run: the model on meta, its shards on the device, then tensor by tensor."""

from __future__ import annotations

import torch
from torch import nn

from headrace.kernels.api import Operators
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder, initial_weights
from headrace.workers.model.hf import iter_weights
from headrace.workers.model.sharded import copy_weights
from headrace.workers.train.config import TrainConfig


def build_model(config: ModelConfig, train: TrainConfig | None = None) -> Decoder:
    """The decoder of a job on the meta device, fp32, with the operators that `train` names."""
    train = TrainConfig() if train is None else train
    operators = Operators(attention=train.attention, kernels=train.kernels)
    return Decoder(config, dtype=torch.float32, device="meta", operators=operators)


def fill_weights(
    model: nn.Module, config: ModelConfig, *, seed: int, device: torch.device, on_device: bool = False
) -> None:
    """Give a sharded model on meta its memory and its first weights: those of `config.init_from`, or random ones.

    One whole tensor is in memory at a time; every rank keeps its part of it.

    Args:
        on_device: draw random weights there. The CPU draws the same ones for every device, but takes minutes for 7B.

    Raises:
        InputError: the folder of `config.init_from` does not hold this model; names file and tensor.
    """
    model.to_empty(device=device)
    if config.init_from is not None:
        source = iter_weights(config.init_from, config)
    else:
        source = initial_weights(config, seed, device if on_device else torch.device("cpu"))
    copy_weights(model, source)
