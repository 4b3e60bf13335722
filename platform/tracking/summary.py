"""What a run was predicted to do and what it did, from the files it left. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from headrace.platform.tracking.run_folder import FIRST_OF_START, LOSS, NUM_RANKS, STEP
from headrace.workers.telemetry import names

Steps = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Args:
        name: of the metric. what: for people. unit: of both values.
        predicted: by the plan; None where it made no prediction.
        measured: None where the run never measured it.
        error_pct: 100 (measured - predicted) / predicted; None where there is no prediction above 0, and for shares,
            which are percentages themselves.
    """

    name: str
    what: str
    unit: str
    predicted: float | None
    measured: float | None
    error_pct: float | None


@dataclass(frozen=True)
class _Line:
    what: str
    unit: str
    reduce: Callable[[Sequence[float]], float]
    warm_only: bool = False
    of_all_ranks: bool = False


LINES: Mapping[str, _Line] = {
    names.GPU_PEAK_GIB: _Line("device peak, fullest rank", "GiB", max),
    names.HOST_PEAK_GIB: _Line("host tier peak, fullest rank", "GiB", max),
    names.SSD_PEAK_GIB: _Line("SSD tier peak, fullest rank", "GiB", max),
    names.HOST_STORED_GIB: _Line("stored to host per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.HOST_LOADED_GIB: _Line("loaded from host per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.SSD_STORED_GIB: _Line("stored to SSD per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.SSD_LOADED_GIB: _Line("loaded from SSD per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.D2H_GBPS: _Line("rate to host while it moves, median", "GB/s", median, warm_only=True),
    names.H2D_GBPS: _Line("rate from host while it moves, median", "GB/s", median, warm_only=True),
    names.SSD_WRITE_GBPS: _Line("rate to SSD while it moves, median", "GB/s", median, warm_only=True),
    names.SSD_READ_GBPS: _Line("rate from SSD while it moves, median", "GB/s", median, warm_only=True),
    names.TENSOR_SENT_GIB: _Line("sent by tensor ranks per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.PIPELINE_SENT_GIB: _Line("sent by pipeline stages per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.ULYSSES_SENT_GIB: _Line("sent by Ulysses ranks per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.RING_SENT_GIB: _Line("sent around rings per step, all ranks", "GiB", fmean, of_all_ranks=True),
    names.STEP_S: _Line("step time, median", "s", median, warm_only=True),
    names.FORWARD_S: _Line("forward of all blocks, median", "s", median, warm_only=True),
    names.BACKWARD_S: _Line("backward of all blocks, median", "s", median, warm_only=True),
    names.EXPOSED_PCT: _Line("exposed transfer, median share of the step", "%", median, warm_only=True),
}


def compare(steps: Steps, predicted: Mapping[str, float], num_ranks: int) -> list[Comparison]:
    """The table of predicted against measured: tier peaks, bytes moved, step time, exposed transfer.

    Of a run that has changed its plan, only the steps under its last one count. The plan is for one rank; bytes moved
    are those of all ranks, so its figures are multiplied. The first step after a start or a restart, or under another
    plan, is not counted in times (allocation, compilation).
    """
    steps = [step for step in steps if step.get(names.REPLANS) == steps[-1].get(names.REPLANS)]
    warm = warm_steps(steps)
    table = []
    for name, line in LINES.items():
        values = series(warm if line.warm_only else steps, name)
        measured = line.reduce(values) if values else None
        wanted = predicted.get(name)
        if wanted is not None and line.of_all_ranks:
            wanted *= num_ranks
        error = 100.0 * (measured - wanted) / wanted if measured is not None and wanted and line.unit != "%" else None
        table.append(Comparison(name, line.what, line.unit, wanted, measured, error))
    return table


def warm_steps(steps: Steps) -> Steps:
    """The steps without the first of every start; all of them when nothing else is there."""
    starts = {min((s[STEP] for s in steps), default=0)} | {s[STEP] for s in steps if s.get(FIRST_OF_START)}
    return [s for s in steps if s[STEP] not in starts] or steps


def series(steps: Steps, name: str) -> list[float]:
    """The values of a metric, without steps that do not have it or where it was not finite."""
    return [float(s[name]) for s in steps if isinstance(s.get(name), int | float)]


def summarize(steps: Steps, predicted: Mapping[str, float], num_ranks: int | None = None) -> dict[str, Any]:
    """The figures of summary.json that come from metrics.jsonl."""
    if num_ranks is None:
        num_ranks = max((int(s.get(NUM_RANKS, 1)) for s in steps), default=1)
    losses, warm = series(steps, LOSS), warm_steps(steps)
    usual = {
        key: (median(values) if (values := series(warm, name)) else None)
        for key, name in {
            "tokens_per_s_per_gpu": names.TOKENS_PER_S_PER_GPU,
            "mfu_causal_pct": names.MFU_CAUSAL_PCT,
            "mfu_full_attention_pct": names.MFU_FULL_ATTENTION_PCT,
            "hfu_pct": names.HFU_PCT,
            "mfu_peak_tflops": names.MFU_PEAK_TFLOPS,
            "step_s": names.STEP_S,
        }.items()
    }
    return {
        "num_ranks": num_ranks,
        "last_step": steps[-1][STEP] if steps else 0,
        "tokens_seen": (series(steps, names.TOKENS_SEEN) or [0.0])[-1],
        "loss": {
            "first": losses[0] if losses else None,
            "last": losses[-1] if losses else None,
            "mean_of_last_5": fmean(losses[-5:]) if losses else None,
        },
        "median": usual,
        "predicted_against_measured": [asdict(line) for line in compare(steps, predicted, num_ranks)],
    }
