"""Threads, determinism and seeds of a run, and that they are given back."""

from __future__ import annotations

import os

import pytest
import torch

from headrace.storage.core.errors import InputError
from headrace.workers.job import RankContext
from headrace.workers.train.config import TrainConfig
from headrace.workers.train.runtime import num_threads_of, torch_runtime


def test_threads_are_shared_by_the_ranks_of_a_node() -> None:
    cores = len(os.sched_getaffinity(0))
    assert num_threads_of(TrainConfig(), RankContext()) == cores
    assert num_threads_of(TrainConfig(), RankContext(local_world_size=2 * cores)) == 1
    assert num_threads_of(TrainConfig(num_threads=3), RankContext()) == 3
    with pytest.raises(InputError, match=r"train\.num_threads=0"):
        num_threads_of(TrainConfig(num_threads=0), RankContext())


def test_settings_hold_inside_and_are_given_back() -> None:
    before = torch.get_num_threads()
    with torch_runtime(TrainConfig(num_threads=before + 1), RankContext()):
        assert torch.get_num_threads() == before + 1
        assert torch.are_deterministic_algorithms_enabled()
        first = torch.rand(3)
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
    with torch_runtime(TrainConfig(num_threads=1, deterministic=False), RankContext()):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.equal(torch.rand(3), first)
