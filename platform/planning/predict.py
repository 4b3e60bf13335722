"""What a plan costs: bytes of every tier and seconds of one step. No torch.

The rules are those of workers/memory (shelf.py, footprint.py), so that predicted and measured can be compared: what a
block sends away is held on the device until the block after the next one starts; loads start `prefetch_layers` blocks
ahead; a slot is free again when its block has the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from headrace.storage.core.records import Medium
from headrace.workers.memory.schedule import STORES_IN_FLIGHT, num_forwarded


@dataclass(frozen=True)
class BlockCost:
    """One block under its layer plan, for one micro-batch of one rank. Bytes, and FLOPs.

    Args:
        forward / backward: most bytes of the block's own tensors on the device at once, its input among them.
        held: on the device between forward and backward.
        host / ssd: that leave for the tier in forward and come back in backward.
        host_slots / ssd_slots: what they take in a slab: whole pages.
        rerun_flops: of what runs again in backward, with codec_flops.
        codec_flops: that fit into the time of encoding and decoding what is held.
    """

    forward: int
    backward: int
    held: int
    host: int = 0
    ssd: int = 0
    host_slots: int = 0
    ssd_slots: int = 0
    rerun_flops: float = 0.0
    codec_flops: float = 0.0

    @property
    def away(self) -> int:
        """Bytes that leave the device."""
        return self.host + self.ssd


@dataclass(frozen=True)
class StepCost:
    """One micro-batch of one rank, as the blocks see it. Bytes and FLOPs.

    Args:
        head_bytes: saved outside of the blocks when the forward pass is over: the gradient that the loss makes.
        norm: of the final norm, which runs as one more block; None: the model has none of its own.
        block_flops / head_flops: forward, of a mean block and of the head.
        block_backward_flops / head_backward_flops: of one that runs nothing again; None: twice the forward.
        fixed_bytes: on the device all the time (weights, gradients, optimizer state); 0 where they do not count.
        process_bytes: of the rank's process in host memory, beside what is counted on the device.
        in_flight: micro-batches that are open at once. Above 1 others come between a forward and its backward.
        table_bytes / token_bytes: of fixed_bytes, the rope tables and the tokens of one micro-batch.
        block_transient_bytes / head_transient_bytes: on the device only while a block, or the loss, is at work, beside
            what the blocks' own costs say.
    """

    num_layers: int
    head_bytes: int
    block_flops: float
    head_flops: float
    fixed_bytes: int = 0
    block_transient_bytes: int = 0
    head_transient_bytes: int = 0
    process_bytes: int = 0
    in_flight: int = 1
    table_bytes: int = 0
    token_bytes: int = 0
    norm: BlockCost | None = None
    block_backward_flops: float | None = None
    head_backward_flops: float | None = None

    @property
    def backward_flops(self) -> float:
        """Of one block that runs nothing again."""
        return 2 * self.block_flops if self.block_backward_flops is None else self.block_backward_flops

    @property
    def whole_flops(self) -> float:
        """Forward and backward of the model."""
        head_back = 2 * self.head_flops if self.head_backward_flops is None else self.head_backward_flops
        return self.num_layers * (self.block_flops + self.backward_flops) + self.head_flops + head_back


@dataclass(frozen=True)
class Rates:
    """What one rank can count on; None means unknown. Bytes per second, FLOP/s."""

    flops: float | None = None
    d2h: float | None = None
    h2d: float | None = None
    ssd_write: float | None = None
    ssd_read: float | None = None


@dataclass(frozen=True)
class Correction:
    """Measured rate over the profile's, of each of `Rates`; what a run has not measured stays 1."""

    flops: float = 1.0
    d2h: float = 1.0
    h2d: float = 1.0
    ssd_write: float = 1.0
    ssd_read: float = 1.0

    def of(self, rates: Rates) -> Rates:
        """The rates, corrected; what is unknown stays unknown."""
        found = ((name, getattr(rates, name)) for name in asdict(self))
        return Rates(**{name: None if rate is None else rate * getattr(self, name) for name, rate in found})


def device_peak_bytes(blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost) -> int:
    """Most bytes resident on the device at one moment of a micro-batch, fixed bytes included."""
    blocks = blocks if cost.norm is None else (*blocks, cost.norm)
    before = [0, *accumulate(block.away for block in blocks)]  # before[i]: what the blocks before block i send away

    def of_last(number: int) -> int:
        """What so many of the last blocks move, of the pass before or behind; such passes are another micro-batch's."""
        return before[-1] - before[max(0, len(blocks) - max(0, number))] if cost.in_flight > 1 else 0

    resident, block_peak = 0, 0
    for i, block in enumerate(blocks):
        left = len(blocks) - 1 - i
        in_flight = before[i] - before[max(0, i - STORES_IN_FLIGHT + 1)]
        in_flight += of_last(STORES_IN_FLIGHT - 1 - i) + of_last(prefetch_layers - left)
        # Backward of block i: what the blocks before it left, the block itself in full, and the loads that came early.
        early = before[i] - before[max(0, i - prefetch_layers)]
        early += of_last(STORES_IN_FLIGHT - 1 - left) + of_last(prefetch_layers - i)
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
class Work:
    """What a plan makes one micro-batch do beside the model's own compute.

    A store must be done when the block after the next one starts, so it hides behind the forward pass of one block; the
    last one also behind the block, or the loss, that follows. A load starts with the backward pass of the block above
    (prefetch_layers) and hides behind it. Neither depends on the order of the blocks: of the blocks that load, the one
    that computes most again counts as the first one, whose own work hides no load.

    Args:
        rerun_flops: of what runs again in backward, with codec_flops: see BlockCost.
        host / ssd: bytes that leave for the tier.
        load_host / load_ssd: of them, bytes that come back: where backward follows forward, the last blocks load
            nothing (num_forwarded), their sources are still on the device.
        store_flops / load_flops: of the compute that stores and loads can hide behind.
        skipped_flops: of the model's own compute, what the plan leaves out.
        is_together: stores and loads run beside the same compute, and beside each other (sweep by chunk).
    """

    rerun_flops: float
    host: int = 0
    ssd: int = 0
    load_host: int = 0
    load_ssd: int = 0
    store_flops: float = 0.0
    load_flops: float = 0.0
    skipped_flops: float = 0.0
    codec_flops: float = 0.0
    is_together: bool = False

    @classmethod
    def of(cls, blocks: Sequence[BlockCost], prefetch_layers: int, cost: StepCost) -> Work:
        """Of any plan of the sweep by layer."""
        rerun, codec = (sum(getattr(b, name) for b in blocks) for name in ("rerun_flops", "codec_flops"))
        leave = [block for block in blocks if block.away]
        if not leave:
            return cls(rerun, codec_flops=codec)
        num_kept = num_forwarded(prefetch_layers, with_norm=cost.norm is not None) if cost.in_flight == 1 else 0
        come_back = [block for block in blocks[: len(blocks) - num_kept] if block.away]
        again = [block.rerun_flops for block in come_back]
        return cls(
            rerun,
            host=sum(block.host for block in leave),
            ssd=sum(block.ssd for block in leave),
            load_host=sum(block.host for block in come_back),
            load_ssd=sum(block.ssd for block in come_back),
            store_flops=len(leave) * cost.block_flops + (cost.head_flops if blocks[-1].away else cost.block_flops),
            load_flops=len(come_back) * cost.backward_flops + sum(again) - max(again, default=0.0),
            codec_flops=codec,
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
    parts = _exposed(work, prefetch_layers, rates)
    exposed = max(parts) if work.is_together else sum(parts)
    return Seconds(compute, _seconds(work.rerun_flops, rates.flops), exposed)


def block_seconds(work: Work, prefetch_layers: int, cost: StepCost, rates: Rates) -> tuple[float, float]:
    """Forward and backward of all blocks in one micro-batch of the sweep by layer, with what they wait for."""
    stores, loads = _exposed(work, prefetch_layers, rates)
    forward, backward = cost.num_layers * cost.block_flops, cost.num_layers * cost.backward_flops + work.rerun_flops
    return _seconds(forward, rates.flops) + stores, _seconds(backward, rates.flops) + loads


def _exposed(work: Work, prefetch_layers: int, rates: Rates) -> tuple[float, float]:
    """Seconds by which stores, and loads, are longer than the compute that they run beside."""
    store_s = _slowest(work.host, work.ssd, rates.d2h, rates.ssd_write)
    load_s = _slowest(work.load_host, work.load_ssd, rates.h2d, rates.ssd_read)
    load_window = _seconds(work.load_flops, rates.flops) if prefetch_layers else 0.0
    return max(0.0, store_s - _seconds(work.store_flops, rates.flops)), max(0.0, load_s - load_window)


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
