"""Which memory plan a run asks for. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from headrace.kernels.codecs.config import CodecName


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
    chunk_sparse = "chunk_sparse"

    @property
    def is_by_chunk(self) -> bool:
        """Whether a chunk passes through all layers before the next one starts."""
        return self.value.startswith("chunk")

    @property
    def is_lossy(self) -> bool:
        """Whether it computes other numbers than the model: nothing chooses such a plan but the user."""
        return self is MemoryPreset.chunk_sparse


class KvPlace(StrEnum):
    """Where keys and values of earlier chunks, and their gradients, live."""

    hbm = "hbm"
    host = "host"
    ssd = "ssd"


@dataclass(kw_only=True, slots=True)
class SparseConfig:
    """Page-sparse attention, for memory=chunk_sparse: a chunk's queries see some pages of the blocks before it.

    Args:
        page: tokens of a page; the chunk is a multiple of it. Each page of a row is one transfer: OOMB has 128 tokens,
            and here small pages cost more work of the host than they save in copies.
        budget: pages that a chunk reads of what lies before it, per layer and row; sink and recent are among them.
        sink: first pages of a document, always read.
        recent: last pages before the chunk, always read.
        place: where keys, values and their gradients live.
        compare_every: steps between comparisons with dense attention on held-out rows, and one after the last step; 0
            means never.
    """

    page: int = 512
    budget: int = 16
    sink: int = 1
    recent: int = 2
    place: KvPlace = KvPlace.host
    compare_every: int = 100


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """The plan's name and the depth of its pipeline.

    Args:
        preset: see MemoryPreset.
        head_groups: groups of KV heads, with their query heads, that attention runs one after another, so that q, k and
            v of one group are on the device at once. None: auto takes as few as fit, other presets one.
        prefetch_layers: how many layers ahead of the backward pass a load is started.
        codec: eight_bit_token or four_bit_group: in which what is placed tile by tile (gate, up, residual) is held from
            forward to backward, wherever that is; for plans by layer. Lossy: the loss is exact, gradients are right on
            average. None: nothing is lossy.
        sparse: see SparseConfig.
    """

    preset: MemoryPreset = MemoryPreset.auto
    prefetch_layers: int = 1
    head_groups: int | None = None
    codec: CodecName | None = None
    sparse: SparseConfig = field(default_factory=SparseConfig)
