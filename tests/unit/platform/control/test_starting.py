"""What each rank is told of its place and of the limits."""

from __future__ import annotations

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.starting import contexts_of


def test_ranks_on_the_driver_s_own_node_cannot_be_cut_off() -> None:
    cluster = ClusterConfig(
        num_nodes=2, gpus_per_node=2, heartbeat_timeout_s=20.0, hang_timeout_s=100.0, interface="ib0"
    )
    master = ("10.0.0.1", 7)
    contexts = contexts_of(cluster, [2, 2], [], master, device="cpu", attempt=3, near_nodes=[False, True])
    assert [(each.rank, each.local_rank, each.poll_timeout_s) for each in contexts] == [
        (0, 0, 40.0),
        (1, 1, 40.0),
        (2, 0, None),
        (3, 1, None),
    ]
    assert {(each.master_addr, each.interface, each.collective_timeout_s, each.attempt) for each in contexts} == {
        ("10.0.0.1", "ib0", 200.0, 3)
    }
