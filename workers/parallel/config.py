"""Parallel degrees. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """data x tensor x ulysses x ring x pipeline = number of ranks.

    Args:
        data: data-parallel degree; None means all ranks that the other degrees leave.
        fsdp: ranks a parameter is sharded over (of data x ulysses x ring); None means all of them.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    pipeline: int = 1
