"""Parallel degrees. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RingLayout(StrEnum):
    """Which tokens of a row the ranks of a ring have.

    zigzag and striped cut every document by itself, so that all ranks have as many scores to compute.
    """

    auto = "auto"  # contiguous where the window is at most a rank's part of the row, else zigzag
    zigzag = "zigzag"  # 2 x ring pieces; rank r has pieces r and 2 x ring - 1 - r
    striped = "striped"  # 4 x ring pieces, dealt in turn
    contiguous = "contiguous"  # one piece of the row for every rank


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """data x tensor x ulysses x ring x pipeline = number of ranks.

    Args:
        data: data-parallel degree; None means all ranks that the other degrees leave.
        fsdp: ranks a parameter is sharded over (of data x ulysses x ring); None means all of them.
        ulysses: ranks that share the tokens of a row and, in attention, its heads.
        ring: ranks that share the tokens of a row and pass keys and values on in attention.
        ring_layout: which tokens each of them has.
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    ring_layout: RingLayout = RingLayout.auto
    pipeline: int = 1
