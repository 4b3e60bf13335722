"""What one side of a comparison hands over, and how it is driven through optimizer steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from headrace.workers.data.batch import TokenBatch
from headrace.workers.train.runtime import CUBLAS_WORKSPACE

BackwardPass = Callable[[int, Sequence[TokenBatch]], float]


@dataclass(frozen=True)
class StepGradients:
    """One step before its update.

    Args:
        loss: mean over the step's valid targets.
        grads: of that mean, by Hugging Face parameter name, in the side's dtype, on the CPU.
    """

    loss: float
    grads: dict[str, torch.Tensor]


def run_steps(
    named_params: Iterable[tuple[str, nn.Parameter]],
    backward: BackwardPass,
    steps: Sequence[Sequence[TokenBatch]],
    lr: float,
) -> list[StepGradients]:
    """Run every step: backward pass, note the gradients, AdamW update (torch's, betas 0.9 and 0.999, no decay).

    Args:
        named_params: by Hugging Face name.
        backward: (step index, micro-batches) -> mean loss; leaves its gradient in the parameters.
    """
    params = dict(named_params)
    optimizer = torch.optim.AdamW(params.values(), lr=lr, weight_decay=0.0, foreach=False, fused=False)
    results = []
    for index, batches in enumerate(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = backward(index, batches)
        grads = {name: (torch.zeros_like(p) if p.grad is None else p.grad) for name, p in params.items()}
        results.append(StepGradients(loss, {name: whole(grad.detach()).cpu() for name, grad in grads.items()}))
        if index + 1 < len(steps):
            optimizer.step()
    return results


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that ranks hold parts of; they must all ask, in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for axis in range(len(placements)):  # one after the other: torch warns of several at once
        placements[axis] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


@contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products are fp32 products (no TF32) for as long as the block runs."""
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels for as long as the block runs, so that equality to the bit can be asked for."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.cuda.is_available():
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")  # read by cuBLAS when its first handle is made
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
