"""Attention of a chunk: its queries against the keys and values of all tokens up to the chunk's end.

Keys and values are written once, when the chunk passes for the first time, and are read from their KV blocks. In
backward, attention adds to the gradients of every block that the chunk sees; those of the chunk's own tokens are
complete then, because all later chunks have added theirs before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from headrace.kernels.api import Packing
from headrace.kernels.attention import AttentionSpec, GradientSink, attention_backward_blocks, attention_forward_blocks
from headrace.kernels.attention.blocks import Block
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.cuda_pages import open_pages
from headrace.storage.device_pages import PagePool
from headrace.workers.memory.chunk_plan import LOADS_AHEAD, AttentionBytes, attention_bytes
from headrace.workers.memory.kv_blocks import KvBlocks, Place, RowShape
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.model.program import MixRule, OutAndLse, Program, RowPart, Rule, Shared, Tensors, by_spans
from headrace.workers.model.skeleton import Reach, Segment, Span, chunk_skeleton


class ChunkKeys:
    """Keys, values and their gradients of all layers, as attention of the chunk at hand needs them.

    Args:
        windows: of attention, by layer.
        kv / grads: hold the blocks.
        meter: told what attention takes while it is at work; None counts nothing.
    """

    def __init__(self, windows: Sequence[int | None], kv: KvBlocks, grads: KvBlocks, meter: Meter | None) -> None:
        self._windows, self._meter = windows, meter
        self._plan: MemoryPlan | None = None
        self.kv, self.grads = kv, grads
        self._pages: PagePool | None = None
        self.memory = ""  # how keys and values in HBM are allocated, once it is known
        self._pass = (0, 0)
        self._row: RowShape | None = None
        self._written: dict[int, int] = {}
        self._finished = len(windows)  # the first layer whose backward of the chunk is over
        self.chunk: RowPart = RowPart((0, 0), 0)
        self.packing: Packing | None = None

    @property
    def block_len(self) -> int:
        """Tokens of a KV block."""
        assert self._plan is not None, "begin comes first"
        assert self._plan.cuts.kv_block is not None, "check_plan has seen it"
        return self._plan.cuts.kv_block

    def begin(self, plan: MemoryPlan, step: int, micro_batch: int) -> None:
        """Start a pass; the blocks of the one before are gone."""
        self._plan, self._pass, self._row = plan, (step, micro_batch), None
        self._written.clear()

    def enter(self, chunk: RowPart, packing: Packing | None) -> None:
        """The next chunk begins.

        Args:
            packing: documents of the tokens up to the chunk's end, where a row holds several.
        """
        self.chunk, self.packing, self._finished = chunk, packing, len(self._windows)
        for blocks in (self.kv, self.grads):
            blocks.settle()

    @contextmanager
    def at_work(self, num_bytes: int) -> Iterator[None]:
        """Tell the meter what attention takes for a moment."""
        hold = None if self._meter is None else self._meter.reserve(num_bytes)
        try:
            yield
        finally:
            if hold is not None:
                hold.release()

    def spec(self, layer: int, q: torch.Tensor, spec: AttentionSpec) -> AttentionSpec:
        """What attention of these queries of the chunk computes, from a spec that knows no blocks."""
        return replace(spec, block_len=self.block_len)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the chunk's keys and values, (B, n, Hkv, D), into their blocks, unless they stand there already."""
        self._start(k)
        begin, end = self.chunk.span
        if self._written.get(layer, 0) >= end:
            return
        self._written[layer] = end
        for index in self._own_blocks():
            first, last = self._rows.span(index)
            low, high = max(begin, first), min(end, last)
            place = (layer, index)
            block = self.kv.new(place) if place not in self.kv else self.kv.get(place)
            block[0][:, low - first : high - first] = k[:, low - begin : high - begin]
            block[1][:, low - first : high - first] = v[:, low - begin : high - begin]

    def leave(self, layer: int) -> None:
        """The next chunk is a later one: blocks of a layer that are full go to their places; some layers have none.

        Behind the last chunk of an evaluation none comes: all blocks of the layer are finished.
        """
        if layer not in self._written:
            return
        if self.chunk.span[1] == self.chunk.num_tokens:
            for place in self.kv.of_layer(layer, 0):
                self.kv.drop(place)
            return
        for place in self._full(layer):
            self.kv.put(place, changed=True)

    def fetch(self, layer: int, order: Sequence[int], *, backward: bool) -> Iterator[Block]:
        """k and v of these blocks up to the chunk's end, one after another; the next ones are on their way."""
        following = layer - 1 if backward else layer + 1
        # Of the last layer the chunk's keys are written and none are read where nothing else is wanted of the chunk.
        readers = range(min(len(self._windows) - self.chunk.is_for_keys, self._finished))
        ahead = [(layer, index) for index in order]
        if following in readers and self._windows[following] == self._windows[layer]:
            ahead += [(following, index) for index in order[:LOADS_AHEAD]]
        own = self._own_blocks()[0]
        for number, index in enumerate(order):
            for place in ahead[number : number + 1 + LOADS_AHEAD]:
                for blocks in (self.kv, self.grads) if backward else (self.kv,):
                    if place in blocks:
                        blocks.want(place)
            first, last = self._rows.span(index)
            block = self.kv.get((layer, index))
            num_keys = min(last, self.chunk.span[1]) - first
            yield block[0][:, :num_keys], block[1][:, :num_keys]
            if index < own:
                self.kv.put((layer, index), changed=False)

    def add(self, layer: int, index: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Add the gradients of a block's keys and values, (B, n, Hkv, D), in fp32 (fp64 for fp64)."""
        place, num_keys = (layer, index), dk.shape[1]
        if place in self.grads:
            block = self.grads.get(place, to_change=True)
            block[0][:, :num_keys] += dk
            block[1][:, :num_keys] += dv
        else:
            block = self.grads.new(place)
            block[0][:, :num_keys] = dk
            block[1][:, :num_keys] = dv
        if index < self._own_blocks()[0]:
            self.grads.put(place, changed=True)

    def take_gradients(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The complete gradients of the chunk's keys and values, (B, n, Hkv, D); the chunk's blocks are finished."""
        self._finished, (begin, end) = layer, self.chunk.span
        parts = []
        for index in self._own_blocks():
            first, last = self._rows.span(index)
            low, high = max(begin, first), min(end, last)
            parts.append(self.grads.get((layer, index))[:, :, low - first : high - first])
        whole = parts[0].to(dtype, copy=True) if len(parts) == 1 else torch.cat(parts, dim=2).to(dtype)
        finished = -(-begin // self.block_len)
        for blocks in (self.kv, self.grads):
            for place in blocks.of_layer(layer, finished):
                blocks.drop(place)
        return whole[0], whole[1]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """See MemoryHandle."""
        yield

    def take_page_counts(self) -> tuple[int, int]:
        """See MemoryHandle."""
        return 0, 0

    def drop_all(self) -> None:
        """Every block is finished."""
        with CleanUps() as closing:
            for blocks in (self.kv, self.grads):
                closing.callback(blocks.drop_all)

    def free(self) -> None:
        """Give the memory back that passes share."""
        self.kv.free()
        self.grads.free()
        if self._pages is not None:
            self._pages.close()

    @property
    def _rows(self) -> RowShape:
        assert self._row is not None, "append comes first"
        return self._row

    def _full(self, layer: int) -> list[Place]:
        """Of what the chunk has written, what no later chunk writes into."""
        return [(layer, index) for index in self._own_blocks() if self._rows.span(index)[1] <= self.chunk.span[1]]

    def _own_blocks(self) -> range:
        """Numbers of the blocks that hold tokens of the chunk."""
        begin, end = self.chunk.span
        return range(begin // self.block_len, -(-end // self.block_len))

    @property
    def num_heads(self) -> int:
        """Of the keys of this rank."""
        return self._rows.heads[0]

    def shape(self) -> tuple[int, int, int, int, torch.dtype] | None:
        """Rows, tokens of a row, heads, their size, and dtype of the pass; None before the first keys."""
        row = self._row
        return None if row is None else (row.batch_size, row.num_tokens, *row.heads, row.dtype)

    def written(self) -> dict[int, int]:
        """By layer, so many tokens have their keys and values in the blocks; the last chunk's come in stage 2."""
        return dict(self._written)

    def reopen(
        self, shape: tuple[int, int, int, int, torch.dtype], written: Mapping[int, int], device: torch.device
    ) -> None:
        """Go on with a pass that another process has begun; its blocks are restored next.

        Raises:
            ValueError: there is no such shape.
        """
        batch_size, num_tokens, num_heads, head_size, dtype = shape
        if min(batch_size, num_tokens, num_heads, head_size) < 1:
            raise ValueError(f"keys of shape {shape}")
        self._open(RowShape(batch_size, num_tokens, self.block_len, (num_heads, head_size), dtype, device))
        self._written.update(written)

    def choice(self) -> dict[str, torch.Tensor]:
        """By name KIND/A/B: the pages chosen in the pass, and what later choices follow from."""
        return {}

    def restore_choice(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on with the choice of another process; reopen comes first."""

    def _start(self, k: torch.Tensor) -> None:
        if self._row is None:
            batch_size, _, num_heads, head_size = k.shape
            heads = (num_heads, head_size)
            self._open(RowShape(batch_size, self.chunk.num_tokens, self.block_len, heads, k.dtype, k.device))

    def _open(self, row: RowShape) -> None:
        self._row = row
        assert self._plan is not None, "begin comes first"
        if not self.memory:
            self._pages, self.memory = open_pages(row.device, self._meter)
        blocks = self._blocks_of(row)
        self.kv.begin(blocks, self._plan.kv, *self._pass, self._pages)
        wide = torch.float64 if row.dtype is torch.float64 else torch.float32
        self.grads.begin(replace(blocks, dtype=wide), self._plan.kv_grads, *self._pass, self._pages)

    def _blocks_of(self, row: RowShape) -> RowShape:
        """What is kept and moved as one."""
        return row


@dataclass(frozen=True)
class _Source:
    """The blocks of one layer, as attention asks for them."""

    keys: ChunkKeys
    layer: int
    backward: bool

    def fetch(self, order: Sequence[int]) -> Iterator[Block]:
        """See BlockSource."""
        return self.keys.fetch(self.layer, order, backward=self.backward)


@dataclass(frozen=True)
class ChunkMix:
    """Attention of a chunk as a rule of the block's program.

    Args:
        segment: `mix` of the chunk's skeleton: its gradient needs q, out and LSE; keys and values are in their blocks.
        whole: the rule over whole rows.
        layer: index of the block.
    """

    segment: Segment
    whole: MixRule
    keys: ChunkKeys
    layer: int
    params: tuple[str, ...] = ()

    def run(self, params: object, values: Tensors, span: Span, shared: Shared) -> Tensors:
        """Queries of a span of the chunk's rows. `values`: q of the span."""
        q, (begin, end) = self.whole.heads(values["q"]), self.keys.chunk.span
        source = _Source(self.keys, self.layer, backward=False)

        def attend(own: torch.Tensor, first: int) -> OutAndLse:
            return attention_forward_blocks(own, source, self._spec(own, first, shared))

        with self.keys.at_work(self._bytes(q).forward):
            return self.whole.made(*by_spans(q, self.whole.query_spans(span, end - begin), attend))

    def receive(self, values: Tensors) -> None:
        """Write the chunk's keys and values, (B, n, width), into their blocks."""
        self.keys.append(self.layer, *(self.whole.heads(values[name]) for name in ("k", "v")))

    def backward(self, values: Tensors, grad: torch.Tensor, shared: Shared) -> Tensors:
        """dq, dk, dv of the chunk's tokens, by the names q, k and v."""
        q, out, dout = (self.whole.heads(tensor) for tensor in (values["q"], values["out"], grad))
        lse = self.whole.lse(values["lse"])
        sink: GradientSink = lambda index, dk, dv: self.keys.add(self.layer, index, dk, dv)  # noqa: E731
        source = _Source(self.keys, self.layer, backward=True)
        with self.keys.at_work(self._bytes(q).backward):
            dq = attention_backward_blocks(dout, q, out, lse, source, sink, self._spec(q, 0, shared))
        dk, dv = self.keys.take_gradients(self.layer, q.dtype)
        return {name: self.whole.rows(part) for name, part in (("q", dq), ("k", dk), ("v", dv))}

    def _bytes(self, q: torch.Tensor) -> AttentionBytes:
        return attention_bytes(
            batch_size=q.shape[0],
            num_queries=q.shape[1],
            num_keys=min(self.keys.block_len, self.keys.chunk.num_tokens),
            heads=(q.shape[2], self.keys.num_heads),
            head_size=q.shape[3],
            itemsize=q.itemsize,
        )

    def _spec(self, q: torch.Tensor, first: int, shared: Shared) -> AttentionSpec:
        begin, end = self.keys.chunk.span
        spec = self.whole.spec(q, end, begin + first, replace(shared, packing=self.keys.packing))
        return self.keys.spec(self.layer, q, spec)


def chunk_program(program: Program, keys: ChunkKeys, layer: int) -> Program:
    """The same block on a chunk: attention reads keys and values from their blocks.

    Raises:
        ValueError: the block has no attention that owns its gradient.
    """
    skeleton = chunk_skeleton(program.skeleton)
    rules: list[Rule] = []
    for rule, segment in zip(program.rules, skeleton.segments, strict=True):
        if segment.reach is Reach.prefix:
            if not isinstance(rule, MixRule):
                raise ValueError(
                    f"segment {segment.name}: the sweep by chunk knows attention, not {type(rule).__name__}"
                )
            rules.append(ChunkMix(segment, rule, keys, layer))
        else:
            rules.append(rule)
    return replace(program, skeleton=skeleton, rules=tuple(rules))
