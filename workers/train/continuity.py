"""What a checkpoint says about the run that wrote it, and how a resumed run differs from it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from headrace.workers.data.bucket_index import BucketIndex
from headrace.workers.data.config import words_of
from headrace.workers.data.index import StepIndex
from headrace.workers.job import TrainJob
from headrace.workers.memory.plan import MemoryPlan

ROWS, SETTINGS, NUM_SKIPPED = "rows", "settings", "num_skipped"
# Keys of `train` that the numbers of a step follow from, apart from those that decide its rows.
_TRAIN_KEYS = ("steps", "batch_size", "micro_batches", "precision", "grad_clip", "non_finite", "max_skipped_steps")


def continuity_facts(
    job: TrainJob, index: StepIndex | BucketIndex, data_digest: str, num_skipped: int
) -> dict[str, Any]:
    """JSON-able facts of a checkpoint: everything that decides which rows a step reads, and the run's other settings.

    Args:
        index: the run's index function.
        data_digest: of the prepared rows, their number and length included.
        num_skipped: steps so far whose loss was not finite and that were left out.
    """
    settings = {f"optim.{key}": value for key, value in asdict(job.optim).items()}
    if job.adapter.is_on:
        settings |= {f"adapter.{key}": value for key, value in asdict(job.adapter).items()}
    settings |= {f"train.{key}": getattr(job.train, key) for key in _TRAIN_KEYS}
    # A lossy plan is another function of the weights.
    settings["memory.sparse"] = "off" if job.plan.pages is None else words_of_pages(job.plan)
    settings["memory.codec"] = "off" if job.plan.cuts.codec is None else job.plan.cuts.codec.value
    rows = {
        "data digest": data_digest,
        "data.eval_fraction": index.eval_fraction,
        "rows per step": index.global_batch,
        "train.seed": index.seed,
    }
    if isinstance(index, BucketIndex):
        # All rows of a micro-batch have one length, so it counts how many there are of each.
        per_micro_batch = words_of([stream.global_batch for stream in index.streams])
        rows |= {"data.buckets": words_of(job.data.buckets), "rows per micro-batch": per_micro_batch}
    return {
        ROWS: rows,
        SETTINGS: settings,
        NUM_SKIPPED: num_skipped,
    }


def words_of_pages(plan: MemoryPlan) -> str:
    """What the choice of pages follows from."""
    assert plan.pages is not None, "a plan with pages"
    settings = {**asdict(plan.pages), "chunk_size": words_of(plan.cuts.chunks)}
    return " ".join(f"{key}={value}" for key, value in settings.items())


def changes(was: Mapping[str, Any], now: Mapping[str, Any], group: str) -> list[str]:
    """What differs in a group (ROWS or SETTINGS) of two runs' facts, one phrase each; new keys do not count."""
    before = was.get(group, {})
    return [
        f"{key} was {before[key]}, is {value}" for key, value in now[group].items() if before.get(key, value) != value
    ]
