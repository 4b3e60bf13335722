"""The peak and the seconds of a plan against closed forms; the peak against a real run is in workers/memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.platform.planning.predict import (
    BlockCost,
    Rates,
    Seconds,
    StepCost,
    Work,
    device_peak_bytes,
    missing_rates,
    step_seconds,
    tier_bytes,
)
from headrace.storage.core.records import Medium

# A block that keeps 100 bytes, and blocks of which the input, of 10 bytes, waits somewhere.
KEEP = BlockCost(100, 100, 100)
RECOMPUTE = BlockCost(10, 100, 10, rerun_flops=6.0)
HOST = replace(RECOMPUTE, held=0, host=10, host_slots=4096)
SSD = replace(RECOMPUTE, held=0, ssd=10, ssd_slots=4096)
PRESETS = {
    "keep": [KEEP] * 6,
    "recompute": [RECOMPUTE] * 6,
    "offload_host": [HOST] * 5 + [RECOMPUTE],
    "offload_ssd": [SSD] * 5 + [RECOMPUTE],
}


COST = StepCost(
    num_layers=6,
    norm=BlockCost(0, 0, 0),
    head_bytes=30,
    block_flops=6.0,
    head_flops=4.0,
)


@pytest.mark.parametrize(
    ("name", "prefetch_layers", "expected"),
    [
        ("keep", 1, 6 * 100 + 30),
        ("recompute", 1, 5 * 10 + 100),  # the last block's backward, its own input among its saved tensors
        ("offload_host", 0, 100),
        ("offload_host", 1, 100 + 10),
        ("offload_ssd", 3, 100 + 3 * 10),
    ],
)
def test_device_peak_of_presets(name: str, prefetch_layers: int, expected: int) -> None:
    assert device_peak_bytes(PRESETS[name], prefetch_layers, COST) == expected


def test_device_peak_of_mixtures() -> None:
    # Two kept blocks: the forward pass ends with both and the head; no copy is under way any more.
    assert device_peak_bytes((HOST, HOST, RECOMPUTE, RECOMPUTE, KEEP, KEEP), 1, COST) == 2 * 10 + 2 * 100 + 30
    # The input that leaves last is still being copied when the forward pass ends.
    assert device_peak_bytes((KEEP, HOST, HOST), 0, COST) == 100 + max(10 + 30, 100)
    fat = replace(COST, head_bytes=0, fixed_bytes=1000, block_transient_bytes=7, head_transient_bytes=500)
    assert device_peak_bytes((KEEP,), 1, fat) == 1000 + 100 + 500


def test_slabs_hold_whole_pages() -> None:
    assert tier_bytes((HOST, SSD, SSD, KEEP)) == {Medium.host: 4096, Medium.ssd: 8192}


def test_seconds_add_up() -> None:
    rates = Rates(flops=2.0, d2h=100.0, h2d=100.0, ssd_write=1.0, ssd_read=0.5)
    block_s, head_s = 3.0, 6.0

    def seconds(blocks: list[BlockCost], prefetch_layers: int) -> Seconds:
        return step_seconds(Work.of(blocks, prefetch_layers, COST), prefetch_layers, COST, rates)

    keep = seconds([KEEP] * 6, 1)
    assert (keep.compute, keep.recompute, keep.exposed) == (18 * block_s + head_s, 0.0, 0.0)
    hidden = seconds([HOST] * 3 + [KEEP] * 3, 1)
    assert (hidden.recompute, hidden.exposed) == (3 * block_s, 0.0)
    # Three inputs to a drive that writes 1 B/s behind four blocks of forward, and reads 0.5 B/s behind three backwards
    # and what two of the blocks compute again.
    slow = seconds([SSD] * 3 + [KEEP] * 3, 1)
    assert slow.exposed == pytest.approx((30 - 4 * block_s) + (60 - (3 * 2 + 2) * block_s))
    assert slow.total == pytest.approx(slow.compute + slow.recompute + slow.exposed)
    # The last block is answered by its source, and the head hides its store.
    work = Work.of([HOST] * 6, 1, COST)
    assert (work.host, work.load_host) == (60, 50)
    assert work.store_flops == 6 * 6.0 + 4.0
    assert seconds([HOST] * 6, 1).exposed == 0.0
    # Without prefetch every load is exposed, and none is forwarded.
    assert seconds([HOST] * 3 + [KEEP] * 3, 0).exposed == pytest.approx(30 / 100)
    assert seconds([HOST] * 6, 0).exposed == pytest.approx(60 / 100)


def test_the_order_of_the_blocks_changes_no_second() -> None:
    """What a store or load hides behind is the work of one block, not of those between two that move something."""
    blocks = [HOST, SSD, RECOMPUTE, HOST, KEEP, KEEP]
    assert Work.of([HOST, KEEP, SSD, RECOMPUTE, HOST, KEEP], 1, COST) == Work.of(blocks, 1, COST)


def test_the_forwarded_block_is_no_load() -> None:
    """One block under a norm: it is stored, and its source is the answer, so no rate of a load is asked for."""
    work = Work.of([SSD], 1, replace(COST, num_layers=1))
    assert (work.ssd, work.load_ssd, work.load_flops) == (10, 0, 0.0)
    assert missing_rates(work, Rates(flops=1.0, d2h=1.0, ssd_write=1.0)) == []
    work = Work.of((KEEP, HOST, HOST, HOST, HOST, SSD), 1, COST)
    assert (work.load_host, work.load_ssd) == (40, 0)
    assert work.load_flops == 4 * COST.backward_flops + 3 * 6.0


def test_missing_rates_are_named() -> None:
    assert missing_rates(Work(0.0), Rates()) == ["flops"]
    assert missing_rates(Work(0.0, host=1, load_host=1), Rates(flops=1.0, d2h=1.0)) == ["h2d"]
    away = Work(0.0, ssd=1, load_ssd=1)
    assert missing_rates(away, Rates(flops=1.0, d2h=1.0, h2d=1.0)) == ["ssd_write", "ssd_read"]
