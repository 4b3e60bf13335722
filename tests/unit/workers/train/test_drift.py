"""Rates against their references, over made-up series of TierStats."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from headrace.storage.core.records import Medium, TierStats
from headrace.workers.telemetry import names
from headrace.workers.train.drift import LEAST_BYTES, NUM_STEPS, DriftWatch

PREDICTED = {names.SSD_WRITE_GBPS: 2.0, names.SSD_READ_GBPS: 4.0}


class Tier:
    """Its counters, step by step.

    Args:
        num_bytes: moved each way in a step.
    """

    def __init__(self, medium: Medium = Medium.ssd, num_bytes: int = 2 * LEAST_BYTES) -> None:
        self.medium, self.num_bytes = medium, num_bytes
        self.stored = self.loaded = 0
        self.store_s = self.load_s = 0.0

    def stats(self) -> TierStats:
        return TierStats(self.medium, 1 << 40, 0, 0, self.stored, self.loaded, self.store_s, self.load_s)

    def step(self, watch: DriftWatch, write: float, read: float | None = None, *, num_bytes: int | None = None):
        """One step at so many GB/s (0: nothing moved)."""
        before, num_bytes = self.stats(), self.num_bytes if num_bytes is None else num_bytes
        read = write if read is None else read
        if write:
            self.stored, self.store_s = self.stored + num_bytes, self.store_s + num_bytes / write / 1e9
        if read:
            self.loaded, self.load_s = self.loaded + num_bytes, self.load_s + num_bytes / read / 1e9
        return watch.judge(before, self.stats())


def steps_until_told(watch: DriftWatch, tier: Tier, rates: Iterable[float]) -> list[int]:
    """After which steps the watch had something to say."""
    told = []
    for number, rate in enumerate(rates, start=1):
        tier.step(watch, rate, 0.0)
        told += [number] * len(watch.take_events())
    return told


def test_rates_are_compared_with_what_another_plan_expects() -> None:
    watch, tier = DriftWatch(PREDICTED, 30.0), Tier()
    assert steps_until_told(watch, tier, [1.0] * 10) == [NUM_STEPS]
    watch.expect({names.SSD_WRITE_GBPS: 1.0})
    metrics = tier.step(watch, 1.0, 4.0)
    assert metrics[names.SSD_WRITE_DRIFT_PCT] == pytest.approx(0.0)
    assert metrics[names.SSD_READ_DRIFT_PCT] == pytest.approx(0.0)
    assert steps_until_told(watch, tier, [0.5] * 10) == [NUM_STEPS]


def test_a_slow_drive_is_told_once_by_tier_direction_and_rates() -> None:
    watch, tier = DriftWatch(PREDICTED, 30.0, rank=3), Tier()
    metrics = tier.step(watch, 1.0, 4.0)
    assert metrics[names.SSD_WRITE_DRIFT_PCT] == pytest.approx(-50.0)
    assert metrics[names.SSD_READ_DRIFT_PCT] == pytest.approx(0.0)
    for _ in range(20):
        tier.step(watch, 1.0, 4.0)
    (event,) = watch.take_events()
    assert event.kind == "tier_drift"
    for words in ("rank 3", "to the ssd tier", "1 GB/s", "tiers.drift_pct=30", "2 GB/s", "doctor --profile", "throttl"):
        assert words in event.text, words
    assert (event.facts["tier"], event.facts["direction"]) == ("ssd", "store")
    assert event.facts["measured_gbps"] == pytest.approx(1.0)
    assert event.facts["reference_gbps"] == 2.0


@pytest.mark.parametrize(("rate", "told"), [(1.41, []), (1.39, [NUM_STEPS]), (9.0, [])])
def test_the_threshold_is_that_of_the_key(rate: float, told: list[int]) -> None:
    assert steps_until_told(DriftWatch(PREDICTED, 30.0), Tier(), [rate] * 10) == told


def test_single_slow_steps_are_no_drift() -> None:
    assert steps_until_told(DriftWatch(PREDICTED, 30.0), Tier(), ([1.0] * (NUM_STEPS - 1) + [2.0]) * 4) == []


def test_after_a_recovery_it_is_told_again_and_not_before() -> None:
    slow, fine = [1.0] * NUM_STEPS, [2.0] * NUM_STEPS
    assert steps_until_told(DriftWatch(PREDICTED, 30.0), Tier(), slow + fine + slow) == [5, 15]
    short = fine[1:]  # as many good steps as do not make a recovery
    assert steps_until_told(DriftWatch(PREDICTED, 30.0), Tier(), slow + short + slow) == [5]


def test_small_steps_say_nothing_and_break_no_series() -> None:
    watch, tier = DriftWatch(PREDICTED, 30.0), Tier()
    for _ in range(10):
        assert tier.step(watch, 0.01, num_bytes=LEAST_BYTES - 1) == {}
        assert tier.step(watch, 0.0) == {}
    assert watch.take_events() == []
    for _ in range(NUM_STEPS):
        tier.step(watch, 1.0, 4.0)
        tier.step(watch, 9.0, num_bytes=LEAST_BYTES - 1)
    assert len(watch.take_events()) == 1


def test_without_a_profile_the_first_steps_that_moved_enough_are_the_reference() -> None:
    watch, tier = DriftWatch({}, 30.0), Tier(Medium.host)
    tier.step(watch, 50.0, num_bytes=MIB_1)  # too small to count as one of them
    for rate in (3.0, 5.0, 4.0, 0.5, 30.0):
        assert tier.step(watch, rate) == {}
    metrics = tier.step(watch, 3.0)
    assert metrics == {names.D2H_DRIFT_PCT: pytest.approx(-25.0), names.H2D_DRIFT_PCT: pytest.approx(-25.0)}
    for _ in range(NUM_STEPS):
        tier.step(watch, 2.0, 4.0)
    (event,) = watch.take_events()
    assert "the median of the first 5 steps" in event.text
    assert "memory bus" in event.text
    assert event.facts["reference_gbps"] == pytest.approx(4.0)


def test_one_rank_of_a_node_speaks_for_its_drive_and_each_for_its_link() -> None:
    watch = DriftWatch({**PREDICTED, names.D2H_GBPS: 2.0}, 30.0, speaks_for_drive=False)
    drive, host = Tier(), Tier(Medium.host)
    for _ in range(NUM_STEPS):
        assert drive.step(watch, 1.0)[names.SSD_WRITE_DRIFT_PCT] == pytest.approx(-50.0)
        host.step(watch, 1.0)
    assert [event.facts["tier"] for event in watch.take_events()] == ["host"]


MIB_1 = 1 << 20
