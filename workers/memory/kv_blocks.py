"""Keys and values of every layer, and their gradients, in fixed KV blocks during one pass of the sweep by chunk.

A row is always cut into the same KV blocks, wherever they live, so residence changes no bit. A block is one tensor
(2, B, n, Hkv, D): keys and values, or the gradients of both. A plan says by token where a block lives: in HBM it is a
part of its layer's arena and never moves; elsewhere it is one blob, and on the device only while it is open.

    new, get    the block is open: on the device, the caller reads and writes it
    put         the caller is done with it for now: its store starts, or its memory is free again
    want        it is needed soon: its load starts
    drop        its tokens are finished
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import LookupResult, Medium
from headrace.storage.device_pages import PageArena, PagePool
from headrace.workers.memory.chunk_plan import STORES_IN_FLIGHT, medium_of
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.memory.plan import Stretch
from headrace.workers.model.skeleton import Span

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack


Place = tuple[int, int]  # layer and number of a KV block


class _BlockShape:
    """What all blocks have in common."""

    @property
    def stores_in_flight(self) -> int:
        """Blocks on their way out whose memory is not free yet."""
        return STORES_IN_FLIGHT

    def owner(self, index: int) -> str:
        """Of a block's blob, where several have the same tokens."""
        return "chunks"


@dataclass(frozen=True)
class RowShape(_BlockShape):
    """What the blocks of a pass look like.

    Args:
        num_tokens: T, of a row.
        block_len: tokens of a KV block; the last one may be shorter.
        heads: Hkv and D.
    """

    batch_size: int
    num_tokens: int
    block_len: int
    heads: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_blocks(self) -> int:
        """KV blocks of a row."""
        return -(-self.num_tokens // self.block_len)

    def span(self, index: int) -> Span:
        """Tokens [begin, end) of a block."""
        return index * self.block_len, min((index + 1) * self.block_len, self.num_tokens)

    def block_shape(self, index: int) -> tuple[int, ...]:
        """(2, B, n, Hkv, D)."""
        begin, end = self.span(index)
        return (2, self.batch_size, end - begin, *self.heads)

    @property
    def longest_shape(self) -> tuple[int, ...]:
        """That of a block that is not cut short."""
        return (2, self.batch_size, self.block_len, *self.heads)


@dataclass(frozen=True)
class StateShape(_BlockShape):
    """States of one kind: block i is what stands before chunk i + 1."""

    chunks: tuple[Span, ...]
    batch_size: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_blocks(self) -> int:
        """Chunks but the first one."""
        return len(self.chunks) - 1

    def span(self, index: int) -> Span:
        """Tokens of the chunk behind the state."""
        return self.chunks[index + 1]

    def block_shape(self, index: int) -> tuple[int, ...]:
        """(1, B, 1, width)."""
        return (1, self.batch_size, 1, self.width)

    @property
    def longest_shape(self) -> tuple[int, ...]:
        """(1, B, 1, width)."""
        return self.block_shape(0)


@dataclass
class BlocksState:
    """The blocks of one kind between two chunks.

    Args:
        stored: places of those that are blobs of a tier.
        tensors: the others, on the device.
    """

    stored: list[Place]
    tensors: dict[Place, torch.Tensor]


@dataclass
class _Block:
    """A block that exists.

    Args:
        tensor: on the device: open, the source of a store or the target of a load; None: only its tier has it.
        key: of its blob, once it has been stored.
    """

    tensor: torch.Tensor | None
    key: BlobKey | None = None
    is_open: bool = True
    is_leaving: bool = False
    is_loading: bool = False


class KvBlocks:
    """One kind of blocks, "kv" or "dkv", of all layers.

    Args:
        name: of the kind, as records show it.
        stack: the rank's tiers; None where no block moves.
        meter: counts arenas and buffers; None counts nothing.
    """

    def __init__(self, name: str, stack: TierStack | None, meter: Meter | None) -> None:
        self._name, self._stack, self._meter = name, stack, meter
        self._pages: PagePool | None = None
        self._shape: RowShape | StateShape | None = None
        self._stretches: tuple[Stretch, ...] = ()
        self._pass = (0, 0)
        self._blocks: dict[Place, _Block] = {}
        self._leaving: deque[Place] = deque()
        # Memory, kept from pass to pass: an arena per layer for what lives in HBM, buffers for the rest.
        self._arenas: dict[int, torch.Tensor] = {}
        self._ranges: dict[int, PageArena] = {}
        self._resident: dict[int, set[int]] = {}  # the blocks of a layer that are in its arena
        self._needed: dict[int, int] = {}  # of a layer's arena: so many first blocks
        self._buffers: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self._holds: list[Hold] = []

    def begin(
        self,
        shape: RowShape | StateShape,
        stretches: tuple[Stretch, ...],
        step: int,
        micro_batch: int,
        pages: PagePool | None = None,
    ) -> None:
        """Start a pass. The memory of the pass before serves again if shape and places are the same.

        Args:
            stretches: where blocks live, by their first token.
            pages: behind the arenas, mapped as the row grows; None: an arena is allocated whole.
        """
        assert not self._blocks, "the pass before has dropped its blocks"
        if (self._shape, self._stretches) != (shape, stretches):
            self.free()
        self._shape, self._stretches, self._pass = shape, stretches, (step, micro_batch)
        self._pages = pages

    def medium(self, index: int) -> Medium | None:
        """The tier in which a block lives; None: HBM."""
        return medium_of(self._stretches, self._row.span(index)[0])

    def new(self, place: Place) -> torch.Tensor:
        """Memory of a block that does not exist yet, not initialised; it is open."""
        assert place not in self._blocks, f"block {place} exists"
        layer, index = place
        if self.medium(index) is None:
            tensor = self._arena(layer)[index]
            self._resident.setdefault(layer, set()).add(index)
            self._map(layer, index)
        else:
            tensor = self._buffer(index)
        self._blocks[place] = _Block(tensor[:, :, : self._row.block_shape(index)[2]])
        return tensor[:, :, : self._row.block_shape(index)[2]]

    def want(self, place: Place) -> None:
        """The block is needed soon: its load starts if it is not on the device."""
        block = self._blocks[place]
        if block.tensor is None:
            assert block.key is not None
            block.tensor, block.is_loading = self._buffer(place[1]), True
            self._tiers.prepare_load(block.key, into=block.tensor)

    def get(self, place: Place, *, to_change: bool = False) -> torch.Tensor:
        """The block, open. Waits for its load.

        Args:
            to_change: what its tier has will be out of date, so its slot there is given back. Waits for its store, too.

        Raises:
            TransferFailed: it could not be read or written.
        """
        self.want(place)
        block = self._blocks[place]
        if block.is_loading:
            assert block.key is not None
            self._tiers.complete_load(block.key)
            block.is_loading = False
        block.is_open = True
        if to_change and block.is_leaving:
            self._finish_store(place)
        if to_change and block.key is not None:
            self._tiers.discard(block.key)
            block.key = None
        assert block.tensor is not None
        return block.tensor

    def put(self, place: Place, *, changed: bool) -> None:
        """The caller is done with the block for now.

        Args:
            changed: whether its tier lacks what the caller wrote.
        """
        block, medium = self._blocks[place], self.medium(place[1])
        block.is_open = False
        if medium is None:
            return
        assert block.tensor is not None
        if changed:
            if block.key is None:
                block.key = self.key(place)
            self._tiers.prepare_store(block.key, block.tensor, medium)
            block.is_leaving = True
            self._leaving.append(place)
            while len(self._leaving) > self._row.stores_in_flight:
                self._finish_store(self._leaving[0])
        elif not block.is_leaving:
            self._give_back(block)

    def settle(self) -> None:
        """Wait for the stores under way: what is not open is then only in its tier."""
        while self._leaving:
            self._finish_store(self._leaving[0])

    def drop(self, place: Place) -> None:
        """The block is finished. No transfer is completed: one that failed would fail again."""
        block = self._blocks.pop(place)
        if self.medium(place[1]) is None:
            self._resident[place[0]].discard(place[1])
            self._map(*place)
        if block.is_leaving:
            self._leaving.remove(place)
        if block.key is not None:
            self._tiers.discard(block.key)
        if block.tensor is not None and self.medium(place[1]) is not None:
            self._give_back(block)

    def drop_all(self) -> None:
        """Every block is finished."""
        with CleanUps() as closing:
            for place in list(self._blocks):
                closing.callback(self.drop, place)

    def free(self) -> None:
        """Give the memory back that passes share."""
        self._arenas.clear()
        self._buffers.clear()
        for arena in self._ranges.values():
            arena.need(0)
        for hold in self._holds:
            hold.release()
        self._holds.clear()

    def state(self) -> BlocksState:
        """All blocks. Stores under way have ended when this returns."""
        self.settle()
        stored = [place for place, block in self._blocks.items() if block.key is not None]
        others = {place: block.tensor for place, block in self._blocks.items() if block.key is None}
        return BlocksState(stored, {place: tensor for place, tensor in others.items() if tensor is not None})

    def restore(self, state: BlocksState) -> None:
        """Go on from the state of another process, whose blobs the stack has adopted. The pass has begun.

        Raises:
            ValueError: a place, a shape or a dtype is none of this pass, or a blob is not there.
        """
        for place in (*state.stored, *state.tensors):
            if place in self._blocks or not 0 <= place[1] < self._row.num_blocks:
                raise ValueError(f"{self._name} block {place} is not one of {self._row.num_blocks}, or is named twice")
        for place in state.stored:
            if self.medium(place[1]) is None or self._tiers.lookup(self.key(place)) is not LookupResult.hit:
                raise ValueError(f"{self._name} block {place} is not in its tier")
            self._blocks[place] = _Block(None, self.key(place), is_open=False)
        for place, tensor in state.tensors.items():
            if tuple(tensor.shape) != self._row.block_shape(place[1]) or tensor.dtype is not self._row.dtype:
                raise ValueError(f"{self._name} block {place} is {tuple(tensor.shape)} {tensor.dtype}")
            self.new(place).copy_(tensor)

    def key(self, place: Place) -> BlobKey:
        """The name of a block's blob."""
        begin, end = self._row.span(place[1])
        return BlobKey(self._row.owner(place[1]), place[0], self._name, begin, end, *self._pass)

    def __contains__(self, place: Place) -> bool:
        """Whether the block exists, on the device or in its tier."""
        return place in self._blocks

    def of_layer(self, layer: int, first: int) -> list[Place]:
        """The blocks of a layer from number `first` on."""
        return [place for place in self._blocks if place[0] == layer and place[1] >= first]

    @property
    def _row(self) -> RowShape | StateShape:
        assert self._shape is not None, "begin comes first"
        return self._shape

    @property
    def _tiers(self) -> TierStack:
        assert self._stack is not None, "a plan that moves blocks is applied with a stack"
        return self._stack

    def _finish_store(self, place: Place) -> None:
        block = self._blocks[place]
        assert block.key is not None
        self._leaving.remove(place)
        block.is_leaving = False
        self._tiers.complete_store(block.key)
        if not block.is_open:
            self._give_back(block)

    def _arena(self, layer: int) -> torch.Tensor:
        """(blocks in HBM, 2, B, block_len, Hkv, D) of a layer: one stretch of memory."""
        if layer not in self._arenas:
            row = self._row
            num_resident = sum(self.medium(index) is None for index in range(row.num_blocks))
            shape = (num_resident, *row.longest_shape)
            self._arenas[layer] = self._allocate(shape) if self._pages is None else self._reserve(layer, shape)
        return self._arenas[layer]

    def _reserve(self, layer: int, shape: tuple[int, ...]) -> torch.Tensor:
        assert self._pages is not None
        if layer not in self._ranges:
            self._ranges[layer] = self._pages.arena()
        whole = self._ranges[layer].tensor(math.prod(shape) * self._row.dtype.itemsize)
        return whole.view(self._row.dtype).view(shape)

    def _map(self, layer: int, index: int) -> None:
        """A block has come or gone: the arena is needed up to the last of its blocks that exist."""
        resident, needed = self._resident[layer], self._needed.get(layer, 0)
        if index in resident:
            self._needed[layer] = max(needed, index + 1)
        elif index + 1 == needed:
            self._needed[layer] = 1 + max(resident, default=-1)
        if layer in self._ranges:
            self._ranges[layer].need(self._needed[layer] * self._arenas[layer][0].nbytes)

    def _buffer(self, index: int) -> torch.Tensor:
        shape = self._row.block_shape(index)
        free = self._buffers.setdefault(shape, [])
        return free.pop() if free else self._allocate(shape)

    def _allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._row.dtype, device=self._row.device)
        if self._meter is not None:
            self._holds.append(self._meter.hold(tensor))
        return tensor

    def _give_back(self, block: _Block) -> None:
        assert block.tensor is not None
        self._buffers.setdefault(tuple(block.tensor.shape), []).append(block.tensor)
        block.tensor = None
