"""Many ranks' values of one step to one value. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from statistics import fmean
from typing import Any

from headrace.platform.tracking.run_folder import GRAD_NORM, LOSS, NUM_RANKS, STEP, UNIX_S
from headrace.workers.telemetry import names


class Rule(StrEnum):
    """How the values of the ranks become the group's.

    group: the ranks have agreed on it (loss, gradient norm, learning rate): the lowest rank's value.
    mean: a rate per GPU. slowest: the largest, since the group waits for it, or the fullest rank, since it is the one
    that runs out. least: the smallest. total: bytes of all ranks. furthest: the value that is furthest from 0 (plan
    errors, drift: both signs).
    """

    group = "group"
    mean = "mean"
    slowest = "slowest"
    least = "least"
    total = "total"
    furthest = "furthest"


RULES: Mapping[str, Rule] = {
    names.LOSS_TRAIN: Rule.group,
    names.LOSS_EVAL: Rule.group,
    names.GRAD_NORM: Rule.group,
    names.LEARNING_RATE: Rule.group,
    names.TOKENS_SEEN: Rule.group,
    names.EPOCH: Rule.group,
    names.SKIPPED_STEPS: Rule.group,
    names.SPARSE_LOSS_DENSE: Rule.group,
    names.SPARSE_LOSS_SPARSE: Rule.group,
    names.SPARSE_LOSS_GAP: Rule.group,
    names.SPARSE_PAGES_READ_PCT: Rule.mean,
    names.STEP_S: Rule.slowest,
    names.DATA_WAIT_S: Rule.slowest,
    names.FORWARD_S: Rule.slowest,
    names.BACKWARD_S: Rule.slowest,
    names.CHECKPOINT_S: Rule.slowest,
    names.CHECKPOINT_FAILURES: Rule.slowest,
    names.GPU_PEAK_GIB: Rule.slowest,
    names.HOST_PEAK_GIB: Rule.slowest,
    names.SSD_PEAK_GIB: Rule.slowest,
    names.HOST_TENSOR_GIB: Rule.slowest,
    names.SSD_TENSOR_GIB: Rule.slowest,
    names.EXPOSED_PCT: Rule.slowest,
    names.HOST_STORED_GIB: Rule.total,
    names.HOST_LOADED_GIB: Rule.total,
    names.SSD_STORED_GIB: Rule.total,
    names.SSD_LOADED_GIB: Rule.total,
    names.TENSOR_SENT_GIB: Rule.total,
    names.ULYSSES_SENT_GIB: Rule.total,
    names.RING_SENT_GIB: Rule.total,
    names.PIPELINE_SENT_GIB: Rule.total,
    **{value: Rule.furthest for name, value in vars(names).items() if name.endswith("_ERROR_PCT")},
    names.REPLANS: Rule.group,
    names.D2H_DRIFT_PCT: Rule.furthest,
    names.H2D_DRIFT_PCT: Rule.furthest,
    names.SSD_WRITE_DRIFT_PCT: Rule.furthest,
    names.SSD_READ_DRIFT_PCT: Rule.furthest,
    # Ranks of a node share its drive: the last one to count it has seen the most.
    names.SSD_WRITTEN_TB: Rule.slowest,
    names.SSD_LIFE_USED_PCT: Rule.slowest,
    names.SSD_BUDGET_USED_PCT: Rule.slowest,
    names.SSD_DAYS_LEFT: Rule.least,
}
_APPLY: Mapping[Rule, Callable[[Sequence[float]], float]] = {
    Rule.group: lambda values: values[0],
    Rule.mean: fmean,
    Rule.slowest: max,
    Rule.least: min,
    Rule.total: sum,
    Rule.furthest: lambda values: max(values, key=abs),
}


def aggregate(by_rank: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """One value per metric, over the ranks that have it. Names without a rule (rates, MFU) are averaged.

    Args:
        by_rank: metrics of each rank that reported the step.
    """
    found: dict[str, list[float]] = {}
    for rank in sorted(by_rank):
        for name, value in by_rank[rank].items():
            found.setdefault(name, []).append(float(value))
    return {name: _APPLY[RULES.get(names.split_tensor(name)[0], Rule.mean)](values) for name, values in found.items()}


def step_line(step: int, metrics: Mapping[str, float], *, unix_s: float, num_ranks: int) -> dict[str, Any]:
    """A line of metrics.jsonl: the group's metrics of one step."""
    return {
        STEP: step,
        LOSS: metrics.get(names.LOSS_TRAIN),
        GRAD_NORM: metrics.get(names.GRAD_NORM),
        **metrics,
        UNIX_S: unix_s,
        NUM_RANKS: num_ranks,
    }
