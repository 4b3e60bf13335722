"""AdamW on the fp32 shards, the learning rate of a step, and the global gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from headrace.storage.core.errors import InputError
from headrace.workers.train.config import OptimConfig, Schedule

STEP, MOMENTS = "step", ("exp_avg", "exp_avg_sq")


def lr_at(step: int, config: OptimConfig, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (0, 1, ...) in a run of `num_steps`: a pure function, nothing to resume.

    Warm-up: lr * (step + 1) / warmup_steps. After it, with p the share of the remaining steps that is done,
    cosine: floor + (1 + cos(pi p)) / 2 * (lr - floor); linear: lr - p * (lr - floor); constant: lr.
    floor = lr * min_lr_ratio is reached at step = num_steps, the first step that is not run.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    if config.schedule is Schedule.cosine:
        return floor + (config.lr - floor) * (1.0 + math.cos(math.pi * done)) / 2.0
    if config.schedule is Schedule.linear:
        return config.lr - (config.lr - floor) * done
    return config.lr


def build_optimizer(named_params: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with fp32 state on fp32 (sharded) weights; norms and biases, which are 1-D, do not decay.

    The moments exist from the start, so that memory does not grow in the first step and a checkpoint loads in place.

    Raises:
        InputError: a value out of range.
    """
    _check(config)
    params = [param for _, param in named_params]
    decayed = [param for param in params if param.dim() > 1]
    others = [param for param in params if param.dim() <= 1]
    fused = bool(params) and params[0].device.type == "cuda"
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    for param in params:
        state = optimizer.state[param]
        state[STEP] = torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu")
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` in the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_params: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, torch.Tensor]:
    """The moments by name, `<parameter>.<moment>`: the live tensors, sharded as their parameter is."""
    return {f"{name}.{moment}": optimizer.state[param][moment] for name, param in named_params for moment in MOMENTS}


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell AdamW's bias correction how many steps there were."""
    for state in optimizer.state.values():
        state[STEP].fill_(float(step))


def local_square_sum(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of squares of this rank's shards, fp64 scalar; per tensor the norm is taken in fp32, in a fixed order."""
    locals_ = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    filled = [grad for grad in locals_ if grad.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64)
    norms = torch.stack(torch._foreach_norm(filled, 2.0))
    return norms.double().square().sum()


def clip_gradients(params: Iterable[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scale all gradients by max_norm / norm where the norm is larger; None leaves them alone."""
    if max_norm is None or norm <= max_norm:
        return
    grads = [param.grad for param in params if param.grad is not None]
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], max_norm / norm)


def _check(config: OptimConfig) -> None:
    bounds: Mapping[str, tuple[float, float]] = {
        "lr": (0.0, math.inf),
        "beta1": (0.0, 1.0),
        "beta2": (0.0, 1.0),
        "eps": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
        "warmup_steps": (0, math.inf),
        "min_lr_ratio": (0.0, 1.0),
    }
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        beyond = value >= high if name.startswith("beta") else value > high
        if not math.isfinite(value) or value < low or beyond:
            raise InputError(f"optim.{name}={value}: give a number from {low:g} to {high:g}")
