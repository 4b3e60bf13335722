"""Whether the tiers still move bytes as fast as the plan was made for. No torch.

A rate is compared with the profile's, which the plan's predictions name; if the profile has none, with the
median of the run's own first steps, so that at least a change within the run is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from headrace.storage.core.records import Direction, Medium, TierStats
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent

MIB = 1024**2
# Fewer bytes in a step than these are a matter of latency and say nothing about a rate.
LEAST_BYTES = 32 * MIB
# So many steps in a row make a drift, and so many the end of one; so many make a reference.
NUM_STEPS = 5
CHANNELS = {
    (Medium.host, Direction.store): (names.D2H_GBPS, names.D2H_DRIFT_PCT),
    (Medium.host, Direction.load): (names.H2D_GBPS, names.H2D_DRIFT_PCT),
    (Medium.ssd, Direction.store): (names.SSD_WRITE_GBPS, names.SSD_WRITE_DRIFT_PCT),
    (Medium.ssd, Direction.load): (names.SSD_READ_GBPS, names.SSD_READ_DRIFT_PCT),
}


@dataclass
class Channel:
    """One tier and direction.

    Args:
        reference_gbps: None until it is known.
        source: where the reference comes from, in words.
        first_gbps: of the steps that will make the reference.
        num_low / num_good: judged steps in a row below the threshold, and above it.
    """

    reference_gbps: float | None = None
    source: str = ""
    first_gbps: list[float] = field(default_factory=list)
    num_low: int = 0
    num_good: int = 0
    is_drifting: bool = False


class DriftWatch:
    """Compares the rates of every step of one rank with what they should be.

    Args:
        predicted: the plan's predictions by metric name (names.D2H_GBPS and the like, GB/s while moving).
        drift_pct: a rate this much below its reference counts as low.
        rank: says whose rates these are.
        speaks_for_drive: whether this rank reports the SSD, which all ranks of a node share.
    """

    def __init__(
        self, predicted: Mapping[str, float], drift_pct: float, *, rank: int = 0, speaks_for_drive: bool = True
    ) -> None:
        self._drift_pct, self._rank, self._speaks_for_drive = drift_pct, rank, speaks_for_drive
        self._channels = {name: Channel() for name in CHANNELS}
        self._events: list[RankEvent] = []
        self.expect(predicted)

    def expect(self, predicted: Mapping[str, float]) -> None:
        """Compare with these predictions from now on; a rate that they do not have keeps its reference."""
        for name in CHANNELS:
            gbps = predicted.get(CHANNELS[name][0], 0.0)
            if gbps > 0.0:
                self._channels[name] = Channel(gbps, "the profile's rate")

    def judge(self, before: TierStats, after: TierStats) -> dict[str, float]:
        """Metrics of one tier's step: percent that each rate is from its reference, where enough was moved."""
        metrics = {}
        for direction, num_bytes, busy_s in (
            (Direction.store, after.stored_bytes - before.stored_bytes, after.store_busy_s - before.store_busy_s),
            (Direction.load, after.loaded_bytes - before.loaded_bytes, after.load_busy_s - before.load_busy_s),
        ):
            name = after.medium, direction
            if name not in CHANNELS or num_bytes < LEAST_BYTES or busy_s <= 0.0:
                continue
            off_pct = self._compare(name, num_bytes / busy_s / 1e9)
            if off_pct is not None:
                metrics[CHANNELS[name][1]] = off_pct
        return metrics

    def take_events(self) -> list[RankEvent]:
        """What there is to say since the last call."""
        events, self._events = self._events, []
        return events

    def _compare(self, name: tuple[Medium, Direction], gbps: float) -> float | None:
        channel = self._channels[name]
        if channel.reference_gbps is None:
            channel.first_gbps.append(gbps)
            if len(channel.first_gbps) == NUM_STEPS:
                channel.reference_gbps = median(channel.first_gbps)
                channel.source = f"the median of the first {NUM_STEPS} steps (the profile has no rate)"
            return None
        off_pct = 100.0 * (gbps - channel.reference_gbps) / channel.reference_gbps
        if off_pct < -self._drift_pct:
            channel.num_low, channel.num_good = channel.num_low + 1, 0
        else:
            channel.num_low, channel.num_good = 0, channel.num_good + 1
        if channel.num_good >= NUM_STEPS:
            channel.is_drifting = False
        if channel.num_low >= NUM_STEPS and not channel.is_drifting:
            channel.is_drifting = True
            self._tell(name, channel, gbps)
        return off_pct

    def _tell(self, name: tuple[Medium, Direction], channel: Channel, gbps: float) -> None:
        medium, direction = name
        if medium is Medium.ssd and not self._speaks_for_drive:
            return
        assert channel.reference_gbps is not None
        way = "to" if direction is Direction.store else "from"
        other = "another program on the drive" if medium is Medium.ssd else "another program that fills the memory bus"
        text = (
            f"rank {self._rank}: {NUM_STEPS} steps in a row moved bytes {way} the {medium.value} tier at "
            f"{gbps:.3g} GB/s on average, more than tiers.drift_pct={self._drift_pct:g} % below {channel.source}, "
            f"{channel.reference_gbps:.3g} GB/s. Look for {other}, for thermal throttling, or measure the profile "
            "again: headrace doctor --profile"
        )
        facts = {
            "rank": self._rank,
            "tier": medium.value,
            "direction": direction.value,
            "measured_gbps": gbps,
            "reference_gbps": channel.reference_gbps,
            "reference": channel.source,
        }
        self._events.append(RankEvent("tier_drift", text, facts))
