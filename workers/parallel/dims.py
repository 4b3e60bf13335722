"""Degrees of parallelism, checked against the number of ranks. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from headrace.storage.core.errors import InputError
from headrace.workers.parallel.config import ParallelConfig


class Axis(StrEnum):
    """Axes of the ranks, from the outermost to the innermost: ranks that differ in the last one are neighbours."""

    pipeline = "pipeline"
    data = "data"
    ring = "ring"
    ulysses = "ulysses"
    tensor = "tensor"


# Ranks along these have different tokens; along the others they work on the same ones.
TOKEN_AXES, SAME_TOKEN_AXES = (Axis.data, Axis.ring, Axis.ulysses), (Axis.pipeline, Axis.tensor)
OTHER_DEGREES = ("tensor", "ulysses", "ring", "pipeline")


@dataclass(frozen=True)
class ParallelDims:
    """Resolved degrees of one run: data x tensor x ulysses x ring x pipeline ranks, made by `resolve_dims`.

    Args:
        fsdp: ranks that one parameter is sharded over; the rest of data x ulysses x ring holds copies.
    """

    data: int
    fsdp: int
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    pipeline: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.data * self.tensor * self.ulysses * self.ring * self.pipeline

    @property
    def num_replicas(self) -> int:
        """Copies of a sharded parameter; above 1 gradients are also all-reduced between them (HSDP)."""
        return self.data * self.ulysses * self.ring // self.fsdp

    @property
    def shape(self) -> dict[Axis, int]:
        """Degrees of all axes, in the order of `Axis`."""
        return {axis: getattr(self, axis) for axis in Axis}

    def coordinate(self, rank: int) -> dict[Axis, int]:
        """Where a rank stands on every axis."""
        place = {}
        for axis, degree in reversed(self.shape.items()):
            rank, place[axis] = divmod(rank, degree)
        return place


def resolve_dims(config: ParallelConfig, world_size: int) -> ParallelDims:
    """Fill in the degrees that were left out and check all of them against the number of ranks.

    Raises:
        InputError: a degree is below 1, or the degrees do not make up `world_size`; names the key.
    """
    given = {name: getattr(config, name) for name in ("data", "fsdp", *OTHER_DEGREES)}
    for name, degree in given.items():
        if degree is not None and degree < 1:
            raise InputError(f"parallel.{name}={degree}: a degree is at least 1")
    others = math.prod(given[name] for name in OTHER_DEGREES)
    if given["data"] is None:
        data, left = divmod(world_size, others)
        if left:
            spelt = " x ".join(f"parallel.{name}={given[name]}" for name in OTHER_DEGREES if given[name] > 1)
            raise InputError(
                f"{spelt}: {world_size} ranks are not a multiple of {others}; start so many (cluster.num_workers, or "
                "cluster.num_nodes x cluster.gpus_per_node)"
            )
    else:
        data = given["data"]
    if data * others != world_size:
        raise InputError(
            f"parallel.data={data} x tensor x ulysses x ring x pipeline={others} makes {data * others} ranks, the run "
            f"has {world_size}; set parallel.data={max(1, world_size // others)}, or start {data * others} ranks "
            "(cluster.num_workers, or cluster.num_nodes x cluster.gpus_per_node)"
        )
    sharded = data * given["ulysses"] * given["ring"]
    fsdp = sharded if given["fsdp"] is None else given["fsdp"]
    if sharded % fsdp:
        divisors = ", ".join(str(d) for d in range(1, sharded + 1) if sharded % d == 0)
        raise InputError(f"parallel.fsdp={fsdp}: not a divisor of data x ulysses x ring = {sharded}; use {divisors}")
    return ParallelDims(data, fsdp, **{name: given[name] for name in OTHER_DEGREES})
