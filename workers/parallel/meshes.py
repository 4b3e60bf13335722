"""The two root meshes of a run, over the same ranks: one for what ranks add up, one for parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from headrace.workers.parallel.dims import Axis, ParallelDims

REPLICATE_AXIS, SHARD_AXIS, TENSOR_AXIS = "replicate", "shard", "tensor"


@dataclass(frozen=True)
class Meshes:
    """Made by `build`, alike on all ranks.

    Args:
        ranks: the axes of `Axis` whose degree is above 1; None for a single rank.
        params: what FSDP2 works on: (shard,), or (replicate, shard) where copies are kept.
        tensor: what shares the parameters of those; None for a tensor degree of 1.
        stages: (pipeline, ..., shard), of parameters that all stages share; None without a pipeline, and with tensor.
    """

    ranks: DeviceMesh | None
    params: DeviceMesh
    tensor: DeviceMesh | None = None
    stages: DeviceMesh | None = None

    @classmethod
    def build(cls, dims: ParallelDims, device_type: str) -> Meshes:
        """Needs a process group of `dims.world_size` ranks.

        Ranks that share a node are neighbours, so the shard axis, which carries most of the traffic, is the inner one.
        """
        shape = {axis: degree for axis, degree in dims.shape.items() if degree > 1}
        copies = {REPLICATE_AXIS: dims.num_replicas} if dims.num_replicas > 1 else {}
        sharded = {**copies, SHARD_AXIS: dims.fsdp}
        ranks = _mesh(device_type, shape) if shape else None
        stages = {Axis.pipeline: dims.pipeline} if dims.pipeline > 1 else {}
        if dims.tensor == 1:
            whole = _mesh(device_type, {**stages, **sharded})
            return cls(ranks, whole[tuple(sharded)], stages=whole if stages else None)
        params = _mesh(device_type, {**stages, **sharded, TENSOR_AXIS: dims.tensor})
        return cls(ranks, params[tuple(sharded)], params[TENSOR_AXIS])

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along the axis only; None where its degree is 1."""
        there = self.ranks is not None and axis in (self.ranks.mesh_dim_names or ())
        return self.ranks.get_group(axis) if self.ranks is not None and there else None

    def add_up(self, values: torch.Tensor, *axes: Axis) -> None:
        """Sum `values` over the ranks of these axes, in place."""
        for axis in axes:
            if (group := self.group(axis)) is not None:
                dist.all_reduce(values, group=group)


def _mesh(device_type: str, shape: Mapping[Any, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(map(str, shape)))
