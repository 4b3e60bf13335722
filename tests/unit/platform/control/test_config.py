"""How many ranks a cluster setting means, and what it refuses."""

from __future__ import annotations

import pytest

from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.storage.core.errors import InputError


@pytest.mark.parametrize(
    ("fields", "per_node", "ranks"),
    [
        ({}, 1, 1),
        ({"num_workers": 4}, 4, 4),
        ({"gpus_per_node": 8}, 8, 8),
        ({"num_nodes": 2, "gpus_per_node": 8}, 8, 16),
        ({"num_nodes": 2, "num_workers": 6}, 3, 6),
        ({"num_nodes": 2, "gpus_per_node": 3, "num_workers": 6}, 3, 6),
    ],
)
def test_number_of_ranks(fields: dict[str, int], per_node: int, ranks: int) -> None:
    config = ClusterConfig(**fields)
    assert (config.ranks_per_node, config.num_ranks) == (per_node, ranks)


def test_a_collective_waits_twice_as_long_as_the_controller_unless_told() -> None:
    assert ClusterConfig(hang_timeout_s=50.0).collective_limit_s == 100.0
    assert ClusterConfig(hang_timeout_s=50.0, collective_timeout_s=60.0).collective_limit_s == 60.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": 2, "num_workers": 3}, "num_workers=3 does not divide"),
        ({"gpus_per_node": 2, "num_workers": 3}, "leave num_workers out"),
        ({"cpus_per_worker": 0.0}, "cpus_per_worker=0"),
        ({"hang_timeout_s": 0.0}, "hang_timeout_s=0"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"node_wait_s": -1.0}, "node_wait_s=-1"),
        ({"heartbeat_timeout_s": 900.0}, "hang_timeout_s=900 is not above cluster.heartbeat_timeout_s=900"),
        ({"collective_timeout_s": 900.0}, "collective_timeout_s=900 .*leave it out for 1800"),
        ({"launcher": Launcher.inline, "num_nodes": 2}, "one machine"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ClusterConfig(**fields).check()
