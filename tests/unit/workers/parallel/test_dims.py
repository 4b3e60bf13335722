"""Degrees: filled in, checked against the ranks, and explained."""

from __future__ import annotations

import itertools

import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.parallel.dims import Axis, ParallelDims, resolve_dims


def test_everything_left_out_means_all_ranks_share_every_parameter() -> None:
    dims = resolve_dims(ParallelConfig(), 8)
    assert (dims.data, dims.fsdp, dims.world_size, dims.num_replicas) == (8, 8, 8, 1)


def test_a_smaller_fsdp_degree_keeps_replicas() -> None:
    dims = resolve_dims(ParallelConfig(data=8, fsdp=2), 8)
    assert (dims.fsdp, dims.num_replicas) == (2, 4)


def test_sharding_spans_data_and_sequence_ranks() -> None:
    dims = ParallelDims(data=2, fsdp=8, ulysses=2, ring=2, tensor=2)
    assert (dims.world_size, dims.num_replicas) == (16, 1)


def test_every_rank_has_one_place_and_neighbours_differ_in_the_last_axis() -> None:
    dims = ParallelDims(data=3, fsdp=3, ulysses=2, tensor=2, pipeline=2)
    places = [dims.coordinate(rank) for rank in range(dims.world_size)]
    ranges = (range(degree) for degree in (2, 3, 1, 2, 2))  # pipeline, data, ring, ulysses, tensor
    assert [tuple(place[axis] for axis in Axis) for place in places] == list(itertools.product(*ranges))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ParallelConfig(data=3), "parallel.data=3.*3 ranks.*has 4.*parallel.data=4"),
        (ParallelConfig(data=0), "parallel.data=0"),
        (ParallelConfig(fsdp=3), "parallel.fsdp=3.*use 1, 2, 4"),
        (ParallelConfig(fsdp=8), "parallel.fsdp=8"),
        (ParallelConfig(pipeline=3), "parallel.pipeline=3.*not a multiple of 3"),
        (ParallelConfig(ring=-1), "parallel.ring=-1"),
    ],
)
def test_what_does_not_fit_is_named(config: ParallelConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve_dims(config, 4)
