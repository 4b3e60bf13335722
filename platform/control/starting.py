"""The steps that every backend takes to start a group: this is your place, go. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.group import Transport, answers_of
from headrace.storage.config import DirectMode
from headrace.storage.core.records import Lease
from headrace.workers.actors.status import Holder, RankHome
from headrace.workers.job import RankContext, TrainJob


@dataclass(frozen=True)
class Slabs:
    """What each node's owners reserve: bytes per node, the folders of the SSD slab, and how its files are opened."""

    host_bytes: int
    ssd_bytes: int
    ssd_folders: tuple[str, ...]
    direct: DirectMode = DirectMode.auto
    memory_grows: bool = False


def holders_of(homes: Sequence[RankHome]) -> list[Holder]:
    """The ranks of one node as owners of slabs know them."""
    return [(f"rank{home.rank}", home.process) for home in homes]


def start_all(ranks: Transport, job: TrainJob, contexts: Sequence[RankContext], timeout_s: float) -> None:
    """Start the training on every rank. Raises RankLost as `answers_of` does."""
    answers_of(ranks, [ranks.send(context.rank, "start", job, context) for context in contexts], timeout_s)


def contexts_of(
    cluster: ClusterConfig,
    ranks_per_node: Sequence[int],
    leases: Sequence[Mapping[str, Lease]],
    master: tuple[str, int],
    *,
    device: str,
    attempt: int,
    near_nodes: Sequence[bool] = (True,),
) -> list[RankContext]:
    """Every rank's place, ranks counted through node by node.

    Args:
        leases: what one slab has lent, by holder; of all nodes.
        master: address and port of the rendezvous.
        near_nodes: whether a node is the driver's own, from which no broken link can cut it off.
    """
    contexts: list[RankContext] = []
    world_size = sum(ranks_per_node)
    for num_local, is_near in zip(ranks_per_node, near_nodes, strict=True):
        for local_rank in range(num_local):
            rank = len(contexts)
            contexts.append(
                RankContext(
                    rank=rank,
                    world_size=world_size,
                    local_rank=local_rank,
                    local_world_size=num_local,
                    master_addr=master[0],
                    master_port=master[1],
                    device=device,
                    interface=cluster.interface,
                    collective_timeout_s=cluster.collective_limit_s,
                    poll_timeout_s=None if is_near else 2 * cluster.heartbeat_timeout_s,
                    attempt=attempt,
                    leases=tuple(lent[f"rank{rank}"] for lent in leases if f"rank{rank}" in lent),
                )
            )
    return contexts
