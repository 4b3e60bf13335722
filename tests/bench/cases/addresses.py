"""Arena of planned addresses over the bytes that are alive, beside what torch's CUDA allocator would reserve.

One step of our decoder runs on CPU under each preset, and every storage's birth and death is recorded. The planner of
addresses, the rules of torch's caching allocator (segments of fixed size, and segments that grow) and first fit then
serve the same requests. torch's allocator serves the step twice, because it begins the second one with the segments of
the first. A kernel's inner buffers are not seen. Counts, no times: they are the same on every machine.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.bench.plan_check import ready_decoder, tokens_of
from headrace.bench.step import MIB, planned_step
from headrace.helpers.requests import RecordedRequests
from headrace.platform.keys import pick
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.workers.memory.addresses import Request, aligned, live_bytes, plan_addresses
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.decoder import Decoder
from headrace.workers.train.timeline import Timeline

DESCRIPTION = "arena of planned addresses over live bytes, beside the rules of torch's CUDA allocator"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    "vocab_size": 4096,
    "seq_len": 1024,
    "presets": "keep,recompute,offload_host,memo,chunk_host",
    # Of the bytes of each request: the segments of torch's allocator are made for larger models.
    "scale": 64,
}
CLOSE = 1.02
SMALL, SMALL_SEGMENT, LARGE_SEGMENT, HUGE, ROUND_HUGE = MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per preset.

    Raises:
        InputError: an unknown shape or preset.
    """
    model = replace(model_shape(str(options["model"])), vocab_size=int(options["vocab_size"]))
    words = str(options["presets"]).split(",")
    presets = [
        MemoryPreset(pick("presets", word, [p.value for p in MemoryPreset if p.value != "auto"])) for word in words
    ]
    decoder, tokens = ready_decoder(model), tokens_of(model, int(options["seq_len"]))
    for preset in presets:
        requests, marks = recorded(deepcopy(decoder), tokens, preset)
        scale = int(options["scale"])
        requests = [replace(request, num_bytes=request.num_bytes * scale) for request in requests]
        live = live_bytes(requests)
        arenas = {
            "planned": plan_addresses(requests, marks).arena_bytes,
            "caching": reserved(requests, grows=False),
            "expandable": reserved(requests, grows=True),
            "first_fit": first_fit(requests),
        }
        numbers: dict[str, float | int] = {"num_requests": len(requests), "live_mib": live / MIB}
        numbers |= {f"{name}_over_live": arena / live for name, arena in arenas.items()}
        target = Target(f"planned at most {CLOSE} x live", arenas["planned"] <= CLOSE * live)
        yield Row(preset.value, numbers, dict(options), target)


def recorded(decoder: Decoder, tokens: torch.Tensor, preset: MemoryPreset) -> tuple[list[Request], list[int]]:
    """The requests of one step, and when each block's pass began; weights and gradients are not among them.

    Args:
        decoder: for this one step: it keeps its hooks.
    """
    profile = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)
    chunk = tokens.shape[1] // 4 if preset.is_by_chunk else None
    request = PlanRequest(
        model=decoder.config, seq_len=tokens.shape[1], profile=profile, preset=preset, chunk_size=chunk
    )
    apart = [tokens, *decoder.parameters(), *(p.grad for p in decoder.parameters() if p.grad is not None)]
    with ExitStack() as closing:
        step, _ = planned_step(asked_plan(request), decoder, tokens, closing)
        seen = RecordedRequests(apart)
        Timeline(list(decoder.blocks), tokens.device, lambda layer, is_backward: seen.mark())
        with seen:
            step()
    return seen.requests, seen.marks


@dataclass(order=True)
class Block:
    """A piece of a segment of torch's allocator."""

    num_bytes: int
    segment: int
    begin: int


class Pool:
    """Small or large blocks of torch's caching allocator, of one stream: best fit, splitting, merging.

    Args:
        grows: one segment that grows by whole pages, as with expandable_segments.
    """

    def __init__(self, is_small: bool, grows: bool) -> None:
        self.is_small, self.grows = is_small, grows
        self.reserved = 0
        self._free: list[Block] = []  # by size, then by address
        self._ends: dict[tuple[int, int], Block] = {}
        self._begins: dict[tuple[int, int], Block] = {}
        self._num_segments = 0

    def take(self, num_bytes: int) -> Block:
        """The smallest free block that holds it, cut to size; else a new segment."""
        place = bisect_left(self._free, Block(num_bytes, -1, -1))
        if place == len(self._free):
            self._add(num_bytes)
            place = bisect_left(self._free, Block(num_bytes, -1, -1))
        block = self._free[place]
        self._remove(block)
        rest = block.num_bytes - num_bytes
        if rest >= 512 if self.is_small or self.grows else rest > SMALL:
            self._put(Block(rest, block.segment, block.begin + num_bytes))
            block = Block(num_bytes, block.segment, block.begin)
        return block

    def give(self, block: Block) -> None:
        """Free a block, and merge it with its free neighbours."""
        if (before := self._ends.get((block.segment, block.begin))) is not None:
            self._remove(before)
            block = Block(before.num_bytes + block.num_bytes, block.segment, before.begin)
        if (after := self._begins.get((block.segment, block.begin + block.num_bytes))) is not None:
            self._remove(after)
            block = Block(block.num_bytes + after.num_bytes, block.segment, block.begin)
        self._put(block)

    def _add(self, num_bytes: int) -> None:
        page = SMALL_SEGMENT if self.is_small else LARGE_SEGMENT
        if self.grows:
            last = self._ends.get((0, self.reserved))
            missing = num_bytes - (0 if last is None else last.num_bytes)
            size, segment, begin = -(-missing // page) * page, 0, self.reserved
        else:
            size = page if self.is_small or num_bytes < HUGE else -(-num_bytes // ROUND_HUGE) * ROUND_HUGE
            self._num_segments += 1
            segment, begin = self._num_segments, 0
        self.reserved += size
        self.give(Block(size, segment, begin))

    def _put(self, block: Block) -> None:
        insort(self._free, block)
        self._begins[block.segment, block.begin] = block
        self._ends[block.segment, block.begin + block.num_bytes] = block

    def _remove(self, block: Block) -> None:
        del self._free[bisect_left(self._free, block)]
        del self._begins[block.segment, block.begin], self._ends[block.segment, block.begin + block.num_bytes]


def reserved(requests: Sequence[Request], *, grows: bool) -> int:
    """Bytes that torch's caching allocator reserves for a step that runs twice."""
    pools = {is_small: Pool(is_small, grows) for is_small in (True, False)}
    for _ in range(2):
        held: dict[int, Block] = {}
        for number, is_begin in events(requests):
            size = aligned(requests[number].num_bytes)
            pool = pools[size <= SMALL]
            if is_begin:
                held[number] = pool.take(size)
            else:
                pool.give(held.pop(number))
    return sum(pool.reserved for pool in pools.values())


def first_fit(requests: Sequence[Request]) -> int:
    """Arena in which each request takes the lowest gap when it comes."""
    held: dict[int, tuple[int, int]] = {}
    arena = 0
    for number, is_begin in events(requests):
        if not is_begin:
            del held[number]
            continue
        begin, size = 0, aligned(requests[number].num_bytes)
        for low, high in sorted(held.values()):
            if low - begin >= size:
                break
            begin = max(begin, high)
        held[number] = begin, begin + size
        arena = max(arena, begin + size)
    return arena


def events(requests: Sequence[Request]) -> list[tuple[int, bool]]:
    """Number of a request and whether it begins, in the order of time; ends come first."""
    ends = [(request.end, 0, number) for number, request in enumerate(requests)]
    begins = [(request.begin, 1, number) for number, request in enumerate(requests)]
    return [(number, bool(is_begin)) for _, is_begin, number in sorted(ends + begins)]
