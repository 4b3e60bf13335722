"""Whole tiny runs in this process: one rank, real data, real tiers, everything but a second process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.helpers.training import RecordedRun, run_recorded, tiny_job, tiny_leases
from headrace.storage.core.records import Lease
from headrace.workers.job import RankContext, TrainJob


@pytest.fixture(scope="session", autouse=True)
def _counts_of_drives_are_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("drives")))
        yield


@pytest.fixture(scope="session")
def run_job() -> Callable[..., RecordedRun]:
    """run_recorded as the only rank: its options, and fields of RankContext."""

    def run(job: TrainJob, **words: Any) -> RecordedRun:
        options = {name: words.pop(name) for name in ("stop_after", "also_on_step", "newest_plan") if name in words}
        return run_recorded(job, RankContext(**words), **options)

    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tests' runs: the data is prepared once."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="session")
def job(run_folder: Path) -> Callable[..., TrainJob]:
    """tiny_job in a run folder of its own."""
    numbers = itertools.count()

    def make(**overrides: Any) -> TrainJob:
        return tiny_job(run_folder, run=f"run{next(numbers)}", **overrides)

    return make


@pytest.fixture(scope="session")
def leases(run_folder: Path) -> Iterator[tuple[Lease, ...]]:
    """A host and an SSD lease, one MiB each."""
    with tiny_leases(run_folder) as per_rank:
        yield per_rank[0]
