"""Turns what a step did into metrics: time, throughput, MFU, peaks and traffic of the tiers, plan against measured."""

from __future__ import annotations

import time
from collections.abc import Mapping

from headrace.storage.core.records import Medium, TierStats
from headrace.storage.stack import TierStack
from headrace.workers.memory.meter import Meter
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent
from headrace.workers.train.drift import DriftWatch
from headrace.workers.train.drive_life import DriveLife

GIB = 1024**3
PEAK_NAMES = {Medium.host: names.HOST_PEAK_GIB, Medium.ssd: names.SSD_PEAK_GIB}
TENSOR_NAMES = {Medium.host: names.HOST_TENSOR_GIB, Medium.ssd: names.SSD_TENSOR_GIB}
TRAFFIC_NAMES = {
    Medium.host: (names.HOST_STORED_GIB, names.HOST_LOADED_GIB, names.D2H_GBPS, names.H2D_GBPS),
    Medium.ssd: (names.SSD_STORED_GIB, names.SSD_LOADED_GIB, names.SSD_WRITE_GBPS, names.SSD_READ_GBPS),
}
PLAN_ERRORS = {
    names.GPU_PEAK_GIB: names.GPU_PEAK_ERROR_PCT,
    names.HOST_PEAK_GIB: names.HOST_PEAK_ERROR_PCT,
    names.SSD_PEAK_GIB: names.SSD_PEAK_ERROR_PCT,
    names.STEP_S: names.STEP_ERROR_PCT,
    names.FORWARD_S: names.FORWARD_ERROR_PCT,
    names.BACKWARD_S: names.BACKWARD_ERROR_PCT,
    names.HOST_STORED_GIB: names.HOST_STORED_ERROR_PCT,
    names.HOST_LOADED_GIB: names.HOST_LOADED_ERROR_PCT,
    names.SSD_STORED_GIB: names.SSD_STORED_ERROR_PCT,
    names.SSD_LOADED_GIB: names.SSD_LOADED_ERROR_PCT,
}


class StepGauges:
    """Reads meters and tiers at the start and the end of every step of one rank.

    Args:
        drift: judges the tiers' rates; None judges none.
        life: counts what is written to the drive; None where no SSD is open.
    """

    def __init__(
        self,
        meter: Meter,
        stack: TierStack | None,
        *,
        drift: DriftWatch | None = None,
        life: DriveLife | None = None,
    ) -> None:
        self._meter, self._stack = meter, stack
        self._drift, self._life = drift, life
        self._counted_bytes = 0
        self._begin_s = self._data_wait_s = self._exposed_s = 0.0
        self._before: Mapping[Medium, TierStats] = {}

    def begin_step(self) -> None:
        """Start the clock and new peaks."""
        self._meter.reset_peak()
        if self._stack is not None:
            self._stack.reset_peaks()
            self._before, self._exposed_s = self._stack.stats(), self._stack.exposed_s
        self._begin_s = time.perf_counter()

    def data_arrived(self) -> None:
        """The step's batches are there."""
        self._data_wait_s = time.perf_counter() - self._begin_s

    def end_step(
        self, rank_tokens: float, planned: Mapping[str, float], block_s: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics of the step, which ends now: the device has nothing left of it to do.

        Args:
            rank_tokens: tokens that this rank read; its share of those that several ranks read.
            planned: what the plan expects of the step, by metric name.
            block_s: seconds of the blocks, by metric name.
        """
        step_s = time.perf_counter() - self._begin_s
        metrics = {
            names.STEP_S: step_s,
            names.DATA_WAIT_S: self._data_wait_s,
            names.TOKENS_PER_S_PER_GPU: rank_tokens / step_s,
            names.GPU_PEAK_GIB: self._meter.peak_bytes / GIB,
            **block_s,
        }
        if self._stack is not None:
            metrics[names.EXPOSED_PCT] = 100.0 * (self._stack.exposed_s - self._exposed_s) / step_s
            stats = self._stack.stats()
            for medium, after in stats.items():
                metrics |= tier_metrics(self._before[medium], after)
                if self._drift is not None:
                    metrics |= self._drift.judge(self._before[medium], after)
            metrics |= self._count_written(stats)
        return metrics | plan_errors(metrics, planned)

    def expect(self, predicted: Mapping[str, float]) -> None:
        """From the next step on, rates are compared with what another plan predicts."""
        if self._drift is not None:
            self._drift.expect(predicted)

    def take_events(self) -> list[RankEvent]:
        """What drive and tiers have given cause to say since the last call."""
        return [event for source in (self._life, self._drift) if source is not None for event in source.take_events()]

    def close(self) -> None:
        """Count what an unfinished step has written; call before the stack is closed."""
        if self._stack is not None:
            self._count_written(self._stack.stats())

    def _count_written(self, stats: Mapping[Medium, TierStats]) -> dict[str, float]:
        if self._life is None:
            return {}
        written = stats[Medium.ssd].stored_bytes
        new, self._counted_bytes = written - self._counted_bytes, written
        return self._life.count(new)


def plan_errors(metrics: Mapping[str, float], planned: Mapping[str, float]) -> dict[str, float]:
    """How far a step is from what the plan expects of it, in percent, for what both have."""
    errors = {
        error: 100.0 * (metrics[name] - planned[name]) / planned[name]
        for name, error in PLAN_ERRORS.items()
        if name in metrics and planned.get(name, 0.0) > 0.0
    }
    if names.EXPOSED_PCT in metrics and names.EXPOSED_PCT in planned:
        errors[names.EXPOSED_ERROR_PCT] = metrics[names.EXPOSED_PCT] - planned[names.EXPOSED_PCT]
    return errors


def tier_metrics(before: TierStats, after: TierStats) -> dict[str, float]:
    """Peaks, bytes moved, and rate while moving (bytes / seconds with I/O in flight, GB = 1e9) between two readings."""
    stored_name, loaded_name, store_rate, load_rate = TRAFFIC_NAMES[after.medium]
    stored, loaded = after.stored_bytes - before.stored_bytes, after.loaded_bytes - before.loaded_bytes
    metrics = {
        PEAK_NAMES[after.medium]: after.peak_bytes / GIB,
        stored_name: stored / GIB,
        loaded_name: loaded / GIB,
    }
    for tensor, num_bytes in after.peak_bytes_by_tensor.items():
        metrics[names.of_tensor(TENSOR_NAMES[after.medium], tensor)] = num_bytes / GIB
    store_s, load_s = after.store_busy_s - before.store_busy_s, after.load_busy_s - before.load_busy_s
    if stored and store_s > 0.0:
        metrics[store_rate] = stored / store_s / 1e9
    if loaded and load_s > 0.0:
        metrics[load_rate] = loaded / load_s / 1e9
    return metrics
