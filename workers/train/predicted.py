"""What plans predict of a step whose micro-batches have rows of several lengths. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from headrace.workers.job import TrainJob
from headrace.workers.telemetry import names

# Of the largest micro-batch; everything else adds up over the micro-batches of a step.
PEAKS = (names.GPU_PEAK_GIB, names.HOST_PEAK_GIB, names.SSD_PEAK_GIB)
# Of the machine, whichever plan uses it.
RATES = (names.D2H_GBPS, names.H2D_GBPS, names.SSD_WRITE_GBPS, names.SSD_READ_GBPS)


def predicted_of_step(job: TrainJob, lengths: Sequence[int]) -> Mapping[str, float]:
    """By metric name, for a step with micro-batches of rows of these lengths."""
    if not job.bucket_plans:
        return job.plan.predicted
    counts = Counter(lengths)
    return mixed(
        {length: job.plan_of(length).predicted for length in counts},
        {length: count / len(lengths) for length, count in counts.items()},
    )


def mixed(predicted: Mapping[int, Mapping[str, float]], shares: Mapping[int, float]) -> dict[str, float]:
    """The prediction of a step in which a length has its share of the micro-batches.

    Args:
        predicted: of every length, for a step of nothing but such micro-batches.
        shares: of every length; they add up to 1. A length whose share is 0 does not count.

    Returns:
        What all lengths predict; of rates, what one of them does.
    """
    used = {length: share for length, share in shares.items() if share > 0}
    every = [predicted[length] for length in used]
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for each in every for name in each):
        values = [each[name] for each in every if name in each]
        if name in PEAKS:
            found[name] = max(values)
        elif name in RATES:
            found[name] = values[0]
        elif len(values) == len(every):
            weights = list(used.values())
            if name == names.EXPOSED_PCT:  # a share of the step's seconds
                weights = [share * each[names.STEP_S] for share, each in zip(weights, every, strict=True)]
            found[name] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return found
