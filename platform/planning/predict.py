"""What a plan costs: bytes of every tier and seconds of one step. No torch.

The rules are those of workers/memory/layer_inputs.py, so that predicted and measured can be compared:
an input that leaves is held on the device until the block after the next one starts; loads start `prefetch_layers`
blocks ahead; a slot is free again when its block has the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import LayerPlan, Residence

STORES_IN_FLIGHT = 2
SLOT_BYTES = 4096


@dataclass(frozen=True)
class StepCost:
    """One micro-batch of one rank, as the blocks see it. Bytes, and FLOPs of one forward.

    Args:
        input_bytes: a block's input.
        saved_bytes: everything autograd saves in a block that keeps its tensors.
        head_bytes: saved outside of the blocks when the forward pass is over (embedding, final norm, loss).
        block_flops / head_flops: forward; backward is counted as twice as much.
        fixed_bytes: on the device all the time (weights, gradients, optimizer state); 0 where they do not count.
        process_bytes: of the rank's process in host memory, beside what is counted on the device.
        block_transient_bytes / head_transient_bytes: on the device only while a block, or the loss, is at work.
        input_is_saved: whether saved_bytes contain the block's input.
    """

    num_layers: int
    input_bytes: int
    saved_bytes: int
    head_bytes: int
    block_flops: float
    head_flops: float
    fixed_bytes: int = 0
    block_transient_bytes: int = 0
    head_transient_bytes: int = 0
    input_is_saved: bool = True
    process_bytes: int = 0

    @property
    def rerun_bytes(self) -> int:
        """What a block that runs again holds: what autograd saves, and its input where that is not among it."""
        return self.saved_bytes + (0 if self.input_is_saved else self.input_bytes)

    @property
    def slot_bytes(self) -> int:
        """What a layer input takes in a slab: whole pages."""
        return -(-self.input_bytes // SLOT_BYTES) * SLOT_BYTES


@dataclass(frozen=True)
class Rates:
    """What one rank can count on; None means unknown. Bytes per second, FLOP/s."""

    flops: float | None = None
    d2h: float | None = None
    h2d: float | None = None
    ssd_write: float | None = None
    ssd_read: float | None = None


def device_peak_bytes(layers: Sequence[LayerPlan], prefetch_layers: int, cost: StepCost) -> int:
    """Most bytes resident on the device at one moment of a micro-batch, fixed bytes included."""
    leaves = [layer.layer_input is not Residence.hbm for layer in layers]
    before = [0, *accumulate(leaves)]  # before[i]: how many of the blocks before block i send their input away
    resident, block_peak = 0, 0
    for i, layer in enumerate(layers):
        # While block i runs its own input is there, whether it stays or leaves.
        kept = layer.rest is Residence.hbm
        now = cost.saved_bytes if kept else cost.input_bytes
        in_flight = before[i] - before[max(0, i - STORES_IN_FLIGHT + 1)]
        # Backward of block i: what the blocks before it left, the block itself in full, and the loads that came early.
        early = before[i] - before[max(0, i - prefetch_layers)]
        again = cost.saved_bytes if kept else cost.rerun_bytes
        forward, backward = in_flight * cost.input_bytes + now, early * cost.input_bytes + again
        block_peak = max(block_peak, resident + max(forward, backward))
        resident += 0 if leaves[i] else now
    in_flight = before[-1] - before[max(0, len(layers) - STORES_IN_FLIGHT)]
    head_peak = resident + in_flight * cost.input_bytes + cost.head_bytes
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
    def of(cls, layers: Sequence[LayerPlan]) -> Counts:
        """Counts of a plan's layers."""
        away = [p.layer_input for p in layers if p.rest is Residence.recompute]
        return cls(
            len(layers) - len(away), away.count(Residence.hbm), away.count(Residence.host), away.count(Residence.ssd)
        )

    @property
    def away(self) -> int:
        """Blocks whose input leaves the device."""
        return self.host + self.ssd


def missing_rates(counts: Counts, rates: Rates) -> list[str]:
    """Names of the rates that predicting the seconds of such a plan needs and that are not known."""
    needed = {"flops": True, "d2h": counts.away, "h2d": counts.away, "ssd_write": counts.ssd, "ssd_read": counts.ssd}
    return [name for name, wanted in needed.items() if wanted and getattr(rates, name) is None]


def step_seconds(counts: Counts, prefetch_layers: int, cost: StepCost, rates: Rates) -> Seconds:
    """Seconds of one micro-batch; unknown rates count as infinite (ask missing_rates first).

    Copies to the host serve both tiers; drives work beside them. Each link is judged by its whole load over a phase,
    against the compute it may hide behind:

        forward   the blocks whose inputs leave and one more, or the loss where the last block's input leaves too
        backward  from the backward of the block above the highest one that waits, to the start of the lowest one's
    """
    block_s = _seconds(cost.block_flops, rates.flops)
    head_s = 3 * _seconds(cost.head_flops, rates.flops)
    recompute = (cost.num_layers - counts.keep) * block_s
    compute = 3 * cost.num_layers * block_s + head_s
    if counts.away == 0:
        return Seconds(compute, recompute, 0.0)
    tail = cost.num_layers - counts.away
    store_window = counts.away * block_s + (block_s if tail else head_s)
    store_s = _slowest(counts, cost.input_bytes, rates.d2h, rates.ssd_write)
    above_s = 0.0 if not tail else (3 if counts.recompute else 2) * block_s
    load_window = above_s + (counts.away - 1) * 3 * block_s if prefetch_layers else 0.0
    load_s = _slowest(counts, cost.input_bytes, rates.h2d, rates.ssd_read)
    # With nothing above it the first load has nothing to hide behind.
    one = Counts(0, 0, min(counts.host, 1), min(counts.ssd, 1))
    first_s = 0.0 if tail and prefetch_layers else _slowest(one, cost.input_bytes, rates.h2d, rates.ssd_read)
    exposed = max(0.0, store_s - store_window) + max(first_s, load_s - load_window)
    return Seconds(compute, recompute, exposed)


def tier_bytes(counts: Counts, cost: StepCost) -> dict[Medium, int]:
    """Bytes of each slab that one micro-batch fills: every input that left is there when the forward pass is over."""
    return {Medium.host: counts.host * cost.slot_bytes, Medium.ssd: counts.ssd * cost.slot_bytes}


def _seconds(amount: float, rate: float | None) -> float:
    return 0.0 if rate is None else amount / rate


def _slowest(counts: Counts, input_bytes: int, link: float | None, drive: float | None) -> float:
    return max(_seconds(counts.away * input_bytes, link), _seconds(counts.ssd * input_bytes, drive))
