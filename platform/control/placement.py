"""Which node gets which ranks, and what each bundle reserves. Pure maths: no Ray, no torch."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.platform.control.config import ClusterConfig
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.train.config import DeviceKind

# The two storage actors of a node share one bundle; Ray schedules no bundle without resources.
STORAGE_CPUS = 0.02
SMALLEST_SHARE = 0.01


@dataclass(frozen=True)
class NodeResources:
    """One node of the cluster: what it has, and what is not reserved; `port` is its raylet's."""

    node_id: str
    address: str
    num_cpus: float
    num_gpus: float
    free_cpus: float
    free_gpus: float
    port: int = 0

    def freed(self, bundles: Sequence[Mapping[str, float]]) -> NodeResources:
        """The node as it is when these bundles are given back."""
        cpus, gpus = (sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU"))
        return replace(self, free_cpus=self.free_cpus + cpus, free_gpus=self.free_gpus + gpus)


@dataclass(frozen=True)
class NodePlacement:
    """One placement group: a bundle for each rank, in order, and the storage bundle last."""

    node_id: str
    address: str
    first_rank: int
    bundles: tuple[dict[str, float], ...]

    @property
    def num_ranks(self) -> int:
        """Ranks on this node."""
        return len(self.bundles) - 1


@dataclass(frozen=True)
class Placement:
    """Where every rank of a group goes. `device` is "cuda" or "cpu"."""

    device: str
    cpus_per_worker: float
    nodes: tuple[NodePlacement, ...]


def place(cluster: ClusterConfig, nodes: Sequence[NodeResources], device: DeviceKind) -> Placement:
    """Choose nodes and cut their bundles.

    Nodes are taken in the order of their addresses, so that a restarted group has its ranks, and what they left on
    local drives, where they were.

    Args:
        nodes: those that are alive.
        device: `auto` takes CUDA where some node has a GPU.

    Raises:
        InputError: the numbers of `cluster` do not agree.
        MachineError: the cluster is too small; says what is wanted, what is there, and what to change.
    """
    per_node = cluster.ranks_per_node
    on_gpu = device is DeviceKind.cuda or (device is DeviceKind.auto and any(node.num_gpus >= 1 for node in nodes))
    kind = "cuda" if on_gpu else "cpu"
    fitting = [node for node in sorted(nodes, key=_by_address) if _shortfall(cluster, node, on_gpu=on_gpu) is None]
    if len(fitting) < cluster.num_nodes:
        raise MachineError(_too_small(cluster, nodes, len(fitting), on_gpu=on_gpu), id=ErrorId.cluster_too_small)
    chosen = fitting[: cluster.num_nodes]
    share = cluster.cpus_per_worker or min(_share(node, per_node) for node in chosen)
    rank_bundle = {"CPU": share, "GPU": 1.0} if on_gpu else {"CPU": share}
    return Placement(
        device=kind,
        cpus_per_worker=share,
        nodes=tuple(
            NodePlacement(
                node.node_id, node.address, i * per_node, (*[dict(rank_bundle)] * per_node, {"CPU": STORAGE_CPUS})
            )
            for i, node in enumerate(chosen)
        ),
    )


def inline_device(device: DeviceKind, num_gpus: int, num_ranks: int) -> str:
    """Device of the ranks on this machine, without a cluster. Raises MachineError where GPUs are too few."""
    if device is DeviceKind.cpu or (device is DeviceKind.auto and num_gpus == 0):
        return "cpu"
    if num_gpus < num_ranks:
        raise MachineError(
            f"{num_ranks} rank(s) need a GPU each and this machine has {num_gpus}; set cluster.num_workers={num_gpus}"
            if num_gpus
            else f"{num_ranks} rank(s) need a GPU each and this machine has none; set train.device=cpu"
        )
    return "cuda"


def _share(node: NodeResources, num_ranks: int) -> float:
    """CPUs of one rank: an even part of what is free, the storage bundle aside, cut to hundredths, 1 at most."""
    even = (node.free_cpus - STORAGE_CPUS) / num_ranks
    return min(1.0, math.floor(100 * even + 1e-6) / 100)


def _shortfall(cluster: ClusterConfig, node: NodeResources, *, on_gpu: bool) -> str | None:
    """Why the node cannot take its ranks, in words; None where it can."""
    per_node = cluster.ranks_per_node
    if on_gpu and node.free_gpus < per_node:
        return f"{per_node} GPU(s) wanted, {node.free_gpus:g} of {node.num_gpus:g} free"
    wanted = per_node * (cluster.cpus_per_worker or SMALLEST_SHARE) + STORAGE_CPUS
    if node.free_cpus + 1e-6 < wanted:
        return f"{wanted:g} CPUs wanted, {node.free_cpus:g} of {node.num_cpus:g} free"
    return None


def _too_small(cluster: ClusterConfig, nodes: Sequence[NodeResources], num_fitting: int, *, on_gpu: bool) -> str:
    per_node = cluster.ranks_per_node
    what = "a GPU" if on_gpu else f"{cluster.cpus_per_worker or SMALLEST_SHARE:g} CPUs"
    lines = [
        f"the Ray cluster is too small: {cluster.num_nodes} node(s) of {per_node} rank(s) with {what} each are wanted, "
        f"{num_fitting} of {len(nodes)} node(s) can take that:"
    ]
    for node in sorted(nodes, key=_by_address):
        lines.append(f"  node {node.address}: {_shortfall(cluster, node, on_gpu=on_gpu) or 'fits'}")
    if not nodes:
        lines.append("  no node is alive")
    if on_gpu:
        remedy = "lower cluster.gpus_per_node or cluster.num_nodes, set train.device=cpu, or add nodes"
    elif cluster.cpus_per_worker is not None:
        remedy = "lower cluster.cpus_per_worker (or leave it out: ranks then share the cores), or cluster.num_workers"
    else:
        remedy = "lower cluster.num_workers or cluster.num_nodes, end the runs that hold the CPUs, or add nodes"
    return "\n".join([*lines, f"  remedy: {remedy}"])


def _by_address(node: NodeResources) -> tuple[int, str]:
    try:
        return int(ipaddress.ip_address(node.address)), node.node_id
    except ValueError:
        raise InputError(f"node address {node.address!r} is not an IP address") from None
