"""DTensor classifiers (FSDP2 and the like): gathered to a full tensor, the gradient going back through DTensor."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from headrace.kernels.loss.options import WeightSum
from headrace.kernels.loss.shards import fingerprint


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is spread over a device mesh."""
    # Without its module there is none; importing it takes seconds.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def full_weight(tensor: torch.Tensor, targets: torch.Tensor, weight_sum: WeightSum | None) -> torch.Tensor:
    """The whole of a DTensor (V, D) or (V,) on every rank; its gradient is sharded as the tensor is.

    Args:
        targets: what this rank scores. weight_sum: see LossOptions.

    Raises:
        ValueError: on every rank, where ranks score different tokens and it was not said how gradients add.
    """
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    if weight_sum is None:
        _check_same_tokens(targets, [mesh.get_group(dim) for dim in range(mesh.ndim)])
    placements = [Partial()] * mesh.ndim if weight_sum is WeightSum.sum else None
    return tensor.full_tensor(grad_placements=placements)  # type: ignore[attr-defined]


def _check_same_tokens(targets: torch.Tensor, groups: list[dist.ProcessGroup]) -> None:
    own = fingerprint(targets)
    for group in groups:
        both = torch.cat((own, -own))
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        if not torch.equal(both[:3], -both[3:]):
            raise ValueError(
                "weight: a DTensor whose ranks score different tokens: expected LossOptions(weight_sum=WeightSum.sum), "
                "which adds their gradients, or the same tokens on every rank"
            )
