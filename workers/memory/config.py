"""Which memory plan a run asks for. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MemoryPreset(StrEnum):
    """Plans with names. `auto` is solved from the budgets; `checkpoint` is another name of `recompute`."""

    auto = "auto"
    keep = "keep"
    recompute = "recompute"
    checkpoint = "checkpoint"
    offload_host = "offload_host"
    offload_ssd = "offload_ssd"
    alst = "alst"
    memo = "memo"
    ssdtrain = "ssdtrain"
    chunk = "chunk"
    chunk_host = "chunk_host"
    chunk_ssd = "chunk_ssd"
    chunk_auto = "chunk_auto"

    @property
    def is_by_chunk(self) -> bool:
        """Whether a chunk passes through all layers before the next one starts."""
        return self.value.startswith("chunk")


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """The plan's name and the depth of its pipeline.

    Args:
        preset: see MemoryPreset.
        prefetch_layers: how many layers ahead of the backward pass a load is started.
    """

    preset: MemoryPreset = MemoryPreset.auto
    prefetch_layers: int = 1
