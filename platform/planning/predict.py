"""What a plan costs: bytes of every tier and seconds of one step. No torch.

The rules are those of workers/memory (shelf.py, footprint.py), so that predicted and measured can be compared: what a
block sends away is held on the device until the block after the next one starts; loads start `prefetch_layers` blocks
ahead; a slot is free again when its block has the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import accumulate

from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import LayerPlan
from headrace.workers.memory.schedule import STORES_IN_FLIGHT, num_forwarded


class Treatment(StrEnum):
    """How the solver treats a block: it keeps every skeletal tensor, or its input in one of three places."""

    keep = "keep"
    recompute = "recompute"
    host = "host"
    ssd = "ssd"


def treatment_of(layer: LayerPlan) -> Treatment:
    """The treatment that a block's plan amounts to, where the plan is one of the solver's."""
    media = {s.residence.medium for row in layer.stretches.values() for s in row} - {None}
    if media:
        return Treatment.ssd if Medium.ssd in media else Treatment.host
    return Treatment.recompute if len(layer.stretches) == 1 else Treatment.keep


@dataclass(frozen=True)
class BlockCost:
    """One block under its layer plan, for one micro-batch of one rank. Bytes, and FLOPs.

    Args:
        forward / backward: most bytes of the block's own tensors on the device at once, its input among them.
        held: on the device between forward and backward.
        host / ssd: that leave for the tier in forward and come back in backward.
        host_slots / ssd_slots: what they take in a slab: whole pages.
        rerun_flops: of what runs again in backward.
    """

    forward: int
    backward: int
    held: int
    host: int = 0
    ssd: int = 0
    host_slots: int = 0
    ssd_slots: int = 0
    rerun_flops: float = 0.0

    @property
    def away(self) -> int:
        """Bytes that leave the device."""
        return self.host + self.ssd


@dataclass(frozen=True)
class StepCost:
    """One micro-batch of one rank, as the blocks see it. Bytes and FLOPs.

    Args:
        blocks: what a block costs under each treatment.
        head_bytes: saved outside of the blocks when the forward pass is over: the gradient that the loss makes.
        norm: of the final norm, which runs as one more block; None: the model has none of its own.
        block_flops / head_flops: forward.
        block_backward_flops / head_backward_flops: of a block that runs nothing again; None: twice the forward.
        fixed_bytes: on the device all the time (weights, gradients, optimizer state); 0 where they do not count.
        process_bytes: of the rank's process in host memory, beside what is counted on the device.
        block_transient_bytes / head_transient_bytes: on the device only while a block, or the loss, is at work, beside
            what the blocks' own costs say.
    """

    num_layers: int
    blocks: Mapping[Treatment, BlockCost]
    head_bytes: int
    block_flops: float
    head_flops: float
    fixed_bytes: int = 0
    block_transient_bytes: int = 0
    head_transient_bytes: int = 0
    process_bytes: int = 0
    norm: BlockCost | None = None
    block_backward_flops: float | None = None
    head_backward_flops: float | None = None

    def of(self, layers: Sequence[Treatment]) -> list[BlockCost]:
        """The cost of every block."""
        return [self.blocks[layer] for layer in layers]

    @property
    def backward_flops(self) -> float:
        """Of one block that runs nothing again."""
        return 2 * self.block_flops if self.block_backward_flops is None else self.block_backward_flops

    @property
    def whole_flops(self) -> float:
        """Forward and backward of the model."""
        head_back = 2 * self.head_flops if self.head_backward_flops is None else self.head_backward_flops
        return self.num_layers * (self.block_flops + self.backward_flops) + self.head_flops + head_back

    def num_forwarded(self, prefetch_layers: int) -> int:
        """How many of the last blocks load nothing."""
        return num_forwarded(prefetch_layers, with_norm=self.norm is not None)

    @property
    def slot_bytes(self) -> int:
        """What a block input takes in a slab."""
        return self.blocks[Treatment.host].host_slots


@dataclass(frozen=True)
class Rates:
    """What one rank can count on; None means unknown. Bytes per second, FLOP/s."""

    flops: float | None = None
    d2h: float | None = None
    h2d: float | None = None
    ssd_write: float | None = None
    ssd_read: float | None = None


def device_peak_bytes(blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost) -> int:
    """Most bytes resident on the device at one moment of a micro-batch, fixed bytes included."""
    blocks = blocks if cost.norm is None else (*blocks, cost.norm)
    before = [0, *accumulate(block.away for block in blocks)]  # before[i]: what the blocks before block i send away
    resident, block_peak = 0, 0
    for i, block in enumerate(blocks):
        in_flight = before[i] - before[max(0, i - STORES_IN_FLIGHT + 1)]
        # Backward of block i: what the blocks before it left, the block itself in full, and the loads that came early.
        early = before[i] - before[max(0, i - prefetch_layers)]
        block_peak = max(block_peak, resident + max(in_flight + block.forward, early + block.backward))
        resident += block.held
    in_flight = before[-1] - before[max(0, len(blocks) - STORES_IN_FLIGHT)]
    head_peak = resident + in_flight + cost.head_bytes
    return cost.fixed_bytes + max(block_peak + cost.block_transient_bytes, head_peak + cost.head_transient_bytes)


@dataclass(frozen=True)
class Seconds:
    """One micro-batch. `exposed` is what transfers add because they do not fit behind the compute they run beside."""

    compute: float
    recompute: float
    exposed: float

    @property
    def total(self) -> float:
        """The micro-batch, end to end."""
        return self.compute + self.recompute + self.exposed


@dataclass(frozen=True)
class Counts:
    """How many blocks keep, recompute from the device, from the host, from the SSD."""

    keep: int
    recompute: int
    host: int
    ssd: int

    @classmethod
    def of(cls, layers: Sequence[Treatment]) -> Counts:
        """Counts of a plan's layers."""
        layers = list(layers)
        return cls(*(layers.count(treatment) for treatment in Treatment))

    @property
    def away(self) -> int:
        """Blocks whose input leaves the device."""
        return self.host + self.ssd


@dataclass(frozen=True)
class Work:
    """What a plan makes one micro-batch do beside the model's own compute.

        forward   stores run from the first block that sends something away to the end of the block after the last such
                  block, or of the loss, where the last block sends something away
        backward  loads run from the backward of the block above the last one that loads, to the start of the first's;
                  the last blocks load nothing (num_forwarded): their sources are still on the device

    Args:
        rerun_flops: of what runs again in backward.
        host / ssd: bytes that leave for the tier.
        load_host / load_ssd: of them, bytes that come back.
        store_flops / load_flops: of the compute that stores and loads can hide behind.
        first_host / first_ssd: bytes of the first block that loads, where no block's backward comes before its own.
        skipped_flops: of the model's own compute, what the plan leaves out.
    """

    rerun_flops: float
    host: int = 0
    ssd: int = 0
    load_host: int = 0
    load_ssd: int = 0
    store_flops: float = 0.0
    load_flops: float = 0.0
    first_host: int = 0
    first_ssd: int = 0
    skipped_flops: float = 0.0

    @classmethod
    def of(cls, blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost) -> Work:
        """Of any plan."""
        rerun = sum(block.rerun_flops for block in blocks)
        leave = [i for i, block in enumerate(blocks) if block.away]
        if not leave:
            return cls(rerun)
        first, last = leave[0], leave[-1]
        stored = cls(
            rerun,
            host=sum(block.host for block in blocks),
            ssd=sum(block.ssd for block in blocks),
            store_flops=(last - first + 1) * cost.block_flops
            + (cost.head_flops if last == len(blocks) - 1 else cost.block_flops),
        )
        come_back = [i for i in leave if i < len(blocks) - cost.num_forwarded(prefetch_layers)]
        if not come_back:
            return stored
        last = come_back[-1]
        is_top = last == len(blocks) - 1
        return replace(
            stored,
            load_host=sum(blocks[i].host for i in come_back),
            load_ssd=sum(blocks[i].ssd for i in come_back),
            load_flops=sum(cost.backward_flops + block.rerun_flops for block in blocks[first + 1 : last + 2]),
            first_host=blocks[last].host if is_top else 0,
            first_ssd=blocks[last].ssd if is_top else 0,
        )

    @classmethod
    def of_counts(cls, counts: Counts, prefetch_layers: int, cost: StepCost) -> Work:
        """Of the arranged plan with these counts (solve.arrange); the same as `of`, without a loop over the blocks."""
        host, ssd = cost.blocks[Treatment.host], cost.blocks[Treatment.ssd]
        rerun_s = cost.blocks[Treatment.recompute].rerun_flops
        rerun = counts.recompute * rerun_s + counts.host * host.rerun_flops + counts.ssd * ssd.rerun_flops
        if not counts.away:
            return cls(rerun)
        tail = cost.num_layers - counts.away
        stored = cls(
            rerun,
            host=counts.host * host.host,
            ssd=counts.ssd * ssd.ssd,
            store_flops=counts.away * cost.block_flops + (cost.block_flops if tail else cost.head_flops),
        )
        come_back = min(counts.away, cost.num_layers - cost.num_forwarded(prefetch_layers))
        if come_back <= 0:
            return stored
        again = cost.backward_flops + host.rerun_flops
        above = cost.backward_flops + (rerun_s if counts.recompute else 0.0) if tail else 0.0
        is_top, top = come_back == cost.num_layers, ssd if counts.ssd else host
        num_ssd = come_back * counts.ssd // counts.away  # as solve.arrange deals them out
        return replace(
            stored,
            load_host=(come_back - num_ssd) * host.host,
            load_ssd=num_ssd * ssd.ssd,
            load_flops=(come_back - 1) * again + (again if come_back < counts.away else above),
            first_host=top.host if is_top else 0,
            first_ssd=top.ssd if is_top else 0,
        )


def missing_rates(work: Work, rates: Rates) -> list[str]:
    """Names of the rates that predicting the seconds of such work needs and that are not known."""
    away, back = work.host + work.ssd, work.load_host + work.load_ssd
    needed = {"flops": 1, "d2h": away, "h2d": back, "ssd_write": work.ssd, "ssd_read": work.load_ssd}
    return [name for name, wanted in needed.items() if wanted and getattr(rates, name) is None]


def step_seconds(work: Work, prefetch_layers: int, cost: StepCost, rates: Rates) -> Seconds:
    """Seconds of one micro-batch; unknown rates count as infinite (ask missing_rates first).

    Copies to the host serve both tiers; drives work beside them. Each link is judged by its whole load over a phase,
    against the compute it may hide behind (see Work).
    """
    compute = _seconds(cost.whole_flops - work.skipped_flops, rates.flops)
    store_s = _slowest(work.host, work.ssd, rates.d2h, rates.ssd_write)
    load_s = _slowest(work.load_host, work.load_ssd, rates.h2d, rates.ssd_read)
    load_window = _seconds(work.load_flops, rates.flops) if prefetch_layers else 0.0
    # With nothing above it the first load has nothing to hide behind.
    first_s = _slowest(work.first_host, work.first_ssd, rates.h2d, rates.ssd_read)
    exposed = max(0.0, store_s - _seconds(work.store_flops, rates.flops)) + max(first_s, load_s - load_window, 0.0)
    return Seconds(compute, _seconds(work.rerun_flops, rates.flops), exposed)


def tier_bytes(blocks: Sequence[BlockCost]) -> dict[Medium, int]:
    """Bytes of each slab that one micro-batch fills: all that left is there when the forward pass is over."""
    return {
        Medium.host: sum(block.host_slots for block in blocks),
        Medium.ssd: sum(block.ssd_slots for block in blocks),
    }


def _seconds(amount: float, rate: float | None) -> float:
    return 0.0 if rate is None else amount / rate


def _slowest(host: int, ssd: int, link: float | None, drive: float | None) -> float:
    return max(_seconds(host + ssd, link), _seconds(ssd, drive))
