"""The peak and the seconds of a plan against closed forms; the peak against a real run is in workers/memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.platform.planning.predict import (
    BlockCost,
    Counts,
    Rates,
    Seconds,
    StepCost,
    Treatment,
    Work,
    device_peak_bytes,
    missing_rates,
    step_seconds,
    tier_bytes,
    treatment_of,
)
from headrace.platform.planning.solve import arrange
from headrace.storage.core.records import Medium
from headrace.workers.memory.presets import preset_plan
from headrace.workers.model.skeleton import opaque_skeleton

KEEP, RECOMPUTE, HOST, SSD = Treatment


def blocks_of(input_bytes: int, saved_bytes: int, *, rerun_bytes: int = 0, rerun_flops: float = 0.0) -> dict:
    """Costs of the four treatments: a kept block holds `saved_bytes`, the others take `rerun_bytes` in backward."""
    again = BlockCost(input_bytes, input_bytes + rerun_bytes, input_bytes, rerun_flops=rerun_flops)
    slot = -(-input_bytes // 4096) * 4096
    return {
        KEEP: BlockCost(saved_bytes, saved_bytes, saved_bytes),
        RECOMPUTE: again,
        HOST: replace(again, held=0, host=input_bytes, host_slots=slot),
        SSD: replace(again, held=0, ssd=input_bytes, ssd_slots=slot),
    }


COST = StepCost(
    num_layers=6,
    blocks=blocks_of(10, 100, rerun_bytes=90, rerun_flops=6.0),
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
    treatments = [treatment_of(layer) for layer in preset_plan(name, [opaque_skeleton()] * 6).layers]
    assert device_peak_bytes(COST.of(treatments), prefetch_layers, COST) == expected


def test_device_peak_of_mixtures() -> None:
    # Two kept blocks: the forward pass ends with both and the head; no copy is under way any more.
    assert device_peak_bytes(COST.of((HOST, HOST, RECOMPUTE, RECOMPUTE, KEEP, KEEP)), 1, COST) == 2 * 10 + 2 * 100 + 30
    # Inputs that leave last are still being copied when the forward pass ends.
    assert device_peak_bytes(COST.of((KEEP, HOST, HOST)), 0, COST) == 100 + max(2 * 10 + 30, 100)
    fat = StepCost(
        6, blocks_of(10, 100), 0, 1.0, 1.0, fixed_bytes=1000, block_transient_bytes=7, head_transient_bytes=500
    )
    assert device_peak_bytes(fat.of((KEEP,)), 1, fat) == 1000 + 100 + 500


def test_slabs_hold_whole_pages() -> None:
    counts = Counts.of((HOST, SSD, SSD, KEEP))
    assert counts == Counts(1, 0, 1, 2)
    assert tier_bytes(COST.of((HOST, SSD, SSD, KEEP))) == {Medium.host: 4096, Medium.ssd: 8192}


def test_seconds_add_up() -> None:
    rates = Rates(flops=2.0, d2h=100.0, h2d=100.0, ssd_write=1.0, ssd_read=0.5)
    block_s, head_s = 3.0, 6.0

    def seconds(counts: Counts, prefetch_layers: int, cost: StepCost = COST) -> Seconds:
        return step_seconds(Work.of_counts(counts, prefetch_layers, cost), prefetch_layers, cost, rates)

    keep = seconds(Counts(6, 0, 0, 0), 1)
    assert (keep.compute, keep.recompute, keep.exposed) == (18 * block_s + head_s, 0.0, 0.0)
    hidden = seconds(Counts(3, 0, 3, 0), 1)
    assert (hidden.recompute, hidden.exposed) == (3 * block_s, 0.0)
    # Three inputs to a drive that writes 1 B/s behind four blocks of forward, and reads 0.5 B/s behind 2 + 2 * 3.
    slow = seconds(Counts(3, 0, 0, 3), 1)
    assert slow.exposed == pytest.approx((30 - 4 * block_s) + (60 - 8 * block_s))
    assert slow.total == pytest.approx(slow.compute + slow.recompute + slow.exposed)
    # The last two blocks are answered by their sources, the last one where a norm is the last call: nothing is exposed.
    with_norm = replace(COST, norm=BlockCost(0, 0, 0))
    for cost, number in ((COST, 4), (with_norm, 5)):
        work = Work.of_counts(Counts(0, 0, 6, 0), 1, cost)
        assert (work.host, work.load_host, work.first_host) == (60, 10 * number, 0)
        assert seconds(Counts(0, 0, 6, 0), 1, cost).exposed == 0.0
    # Without prefetch every load is exposed, and with a norm too none is forwarded.
    assert seconds(Counts(3, 0, 3, 0), 0).exposed == pytest.approx(30 / 100)
    assert seconds(Counts(0, 0, 6, 0), 0, with_norm).exposed == pytest.approx(60 / 100)


def test_the_forwarded_block_is_no_load() -> None:
    """One block under a norm: it is stored, and its source is the answer, so no rate of a load is asked for."""
    one = replace(COST, num_layers=1, norm=BlockCost(0, 0, 0))
    work = Work.of(one.of((SSD,)), 1, one)
    assert (work.ssd, work.load_ssd, work.load_flops) == (10, 0, 0.0)
    assert missing_rates(work, Rates(flops=1.0, d2h=1.0, ssd_write=1.0)) == []
    # Above the last block that loads stands the forwarded one, whose backward hides the load.
    work = Work.of(COST.of((KEEP, HOST, HOST, HOST, HOST, SSD)), 1, replace(COST, norm=one.norm))
    assert (work.load_host, work.load_ssd, work.first_host, work.first_ssd) == (40, 0, 0, 0)
    assert work.load_flops == 4 * (COST.backward_flops + 6.0)


def test_missing_rates_are_named() -> None:
    assert missing_rates(Work(0.0), Rates()) == ["flops"]
    assert missing_rates(Work(0.0, host=1, load_host=1), Rates(flops=1.0, d2h=1.0)) == ["h2d"]
    away = Work(0.0, ssd=1, load_ssd=1)
    assert missing_rates(away, Rates(flops=1.0, d2h=1.0, h2d=1.0)) == ["ssd_write", "ssd_read"]


def test_counts_are_a_short_way_to_the_same_work() -> None:
    for counts in (Counts(6, 0, 0, 0), Counts(1, 2, 1, 2), Counts(0, 0, 6, 0), Counts(0, 0, 2, 4), Counts(0, 3, 3, 0)):
        for prefetch_layers in (0, 1, 2):
            for cost in (COST, replace(COST, norm=BlockCost(0, 0, 0))):
                found = Work.of_counts(counts, prefetch_layers, cost)
                assert found == Work.of(cost.of(arrange(counts)), prefetch_layers, cost)
