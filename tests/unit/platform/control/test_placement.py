"""Bundles from a cluster's resources, and the shortfall in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.placement import STORAGE_CPUS, NodeResources, inline_device, place
from headrace.storage.core.errors import MachineError
from headrace.workers.train.config import DeviceKind


def node(
    address: str, cpus: float = 8, gpus: float = 0, free_cpus: float | None = None, free_gpus: float | None = None
):
    return NodeResources(
        f"id-{address}", address, cpus, gpus, cpus if free_cpus is None else free_cpus,
        gpus if free_gpus is None else free_gpus,
    )  # fmt: skip


def test_four_ranks_share_two_cores() -> None:
    found = place(ClusterConfig(num_workers=4), [node("10.0.0.1", cpus=2)], DeviceKind.auto)
    assert found.device == "cpu"
    assert found.cpus_per_worker == 0.49
    assert found.nodes[0].bundles == (*[{"CPU": 0.49}] * 4, {"CPU": STORAGE_CPUS})


@given(st.integers(1, 64), st.floats(1, 256))
def test_bundles_never_ask_for_more_than_is_free(num_ranks: int, free: float) -> None:
    found = place(ClusterConfig(num_workers=num_ranks), [node("10.0.0.1", cpus=free)], DeviceKind.cpu)
    asked = sum(bundle["CPU"] for bundle in found.nodes[0].bundles)
    assert asked <= free + 1e-6
    assert 0 < found.cpus_per_worker <= 1


def test_one_gpu_per_rank_and_a_storage_bundle_on_every_node_in_order_of_addresses() -> None:
    nodes = [node("10.0.0.10", 64, 8), node("10.0.0.9", 64, 8), node("10.0.0.1", 64, 0)]
    found = place(ClusterConfig(num_nodes=2, gpus_per_node=8), nodes, DeviceKind.auto)
    assert found.device == "cuda"
    assert [(each.address, each.first_rank) for each in found.nodes] == [("10.0.0.9", 0), ("10.0.0.10", 8)]
    assert all(each.bundles == (*[{"CPU": 1.0, "GPU": 1.0}] * 8, {"CPU": STORAGE_CPUS}) for each in found.nodes)
    assert all(each.num_ranks == 8 for each in found.nodes)


def test_train_device_cpu_leaves_gpus_alone() -> None:
    found = place(ClusterConfig(num_workers=2), [node("10.0.0.1", 8, 4)], DeviceKind.cpu)
    assert all("GPU" not in bundle for bundle in found.nodes[0].bundles)


@pytest.mark.parametrize(
    ("cluster", "nodes", "device", "words"),
    [
        (ClusterConfig(gpus_per_node=8), [node("10.0.0.1", 64, 8, free_gpus=3)], "cuda", r"8 GPU\(s\) wanted, 3 of 8"),
        (ClusterConfig(), [node("10.0.0.1")], "cuda", "train.device=cpu"),
        (ClusterConfig(num_nodes=2), [node("10.0.0.1")], "cpu", r"1 of 1 node\(s\) can take that"),
        (ClusterConfig(num_workers=4, cpus_per_worker=1), [node("10.0.0.1", 2)], "cpu", "4.02 CPUs wanted, 2 of 2"),
        (ClusterConfig(), [node("10.0.0.1", 2, free_cpus=0)], "cpu", "0 of 2 free"),
        (ClusterConfig(), [], "cpu", "no node is alive"),
    ],
)
def test_a_cluster_too_small_is_told_in_words(cluster, nodes, device: str, words: str) -> None:
    with pytest.raises(MachineError, match=words) as caught:
        place(cluster, nodes, DeviceKind(device))
    assert "remedy" in str(caught.value)


def test_device_without_a_cluster() -> None:
    assert inline_device(DeviceKind.auto, 0, 2) == "cpu"
    assert inline_device(DeviceKind.cpu, 8, 2) == "cpu"
    assert inline_device(DeviceKind.auto, 2, 2) == "cuda"
    with pytest.raises(MachineError, match="num_workers=1"):
        inline_device(DeviceKind.auto, 1, 2)
    with pytest.raises(MachineError, match="has none"):
        inline_device(DeviceKind.cuda, 0, 1)
