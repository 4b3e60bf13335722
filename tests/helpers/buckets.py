"""Helpers for tests of rows of several lengths (data.buckets): tiny data, and whole tiny jobs over it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.helpers.training import SAYING, tiny_data, tiny_job
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import prepare
from headrace.workers.job import TrainJob
from headrace.workers.memory.plan import Cuts, MemoryPlan
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.skeleton import dense_skeleton

# Lengths of which a micro-batch has one row each, and lengths of which it has several.
CLOSE, FAR = (17, 24, 32), (8, 16, 32)
TILES = {8: 2, 16: 4, 17: 8, 24: 8, 32: 8}


def tiny_bucket_data(folder: Path, buckets: Sequence[int] = FAR) -> DataConfig:
    """A prepared folder of 200 documents of 1 to 30 words in rows of these lengths; the longest has 32 tokens.

    Returns:
        A configuration with `prepared` set. The tokenizer is that of tiny_data(folder).
    """
    plain, source = tiny_data(folder), folder / "lengths.jsonl"
    if not source.exists():
        draw, words = random.Random(5), SAYING.split()
        texts = (" ".join(draw.choice(words) for _ in range(draw.randrange(1, 30))) for _ in range(200))
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = replace(plain, prepared=None, buckets=list(buckets), source=str(source), tokenizer=plain.prepared)
    return replace(config, prepared=str(prepare(config).folder))


def plan_of_length(preset: str, model: ModelConfig, length: int) -> MemoryPlan:
    """A preset's plan for rows of so many tokens, in tiles of TILES[length] tokens."""
    choices = Choices(length, host_fraction=0.5, ssd_fraction=0.25, inputs_on_ssd=0.5)
    skeletons = [dense_skeleton(model)] * model.num_layers
    return preset_plan(preset, skeletons, cuts=Cuts(TILES[length]), choices=choices)


def with_buckets(plain: TrainJob, data: DataConfig, memory: str = "keep") -> TrainJob:
    """A job of tiny_job over rows of the lengths of `data`, each with its plan."""
    plans = {length: plan_of_length(memory, plain.model, length) for length in data.buckets}
    return replace(plain, data=data, plan=plans.pop(data.seq_len), bucket_plans=plans)


def tiny_bucket_job(folder: Path, *, memory: str = "keep", buckets: Sequence[int] = FAR, **options: Any) -> TrainJob:
    """tiny_job with the data of tiny_bucket_data: four steps of three micro-batches, one row of the longest in each."""
    options["train"] = {"steps": 4, "batch_size": 1, "micro_batches": 3, **options.get("train", {})}
    return with_buckets(tiny_job(folder, **options), tiny_bucket_data(folder / "data", buckets), memory)
