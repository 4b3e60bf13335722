"""The steps that every backend takes to start a group: where are you, this is your place, go. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.platform.control.group import RankLost, Transport
from headrace.storage.core.records import Lease
from headrace.workers.job import RankContext, TrainJob


def ask_all(ranks: Transport, method: str, timeout_s: float) -> list[Any]:
    """Call a method of every rank; its values by rank.

    Raises:
        RankLost: a rank died, or did not answer in time.
    """
    return _answers(ranks, [ranks.send(rank, method) for rank in range(ranks.num_ranks)], timeout_s)


def start_all(ranks: Transport, job: TrainJob, contexts: Sequence[RankContext], timeout_s: float) -> None:
    """Tell every rank to train. Raises RankLost as `ask_all` does."""
    _answers(ranks, [ranks.send(context.rank, "start", job, context) for context in contexts], timeout_s)


def contexts_of(
    ranks_per_node: Sequence[int],
    leases: Sequence[Mapping[str, Lease]],
    master: tuple[str, int],
    *,
    device: str,
    attempt: int,
) -> list[RankContext]:
    """Every rank's place, ranks counted through node by node.

    Args:
        leases: what one slab has lent, by holder; of all nodes.
        master: address and port of the rendezvous.
    """
    contexts: list[RankContext] = []
    world_size = sum(ranks_per_node)
    for num_local in ranks_per_node:
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
                    attempt=attempt,
                    leases=tuple(lent[f"rank{rank}"] for lent in leases if f"rank{rank}" in lent),
                )
            )
    return contexts


def _answers(ranks: Transport, tickets: Sequence[Any], timeout_s: float) -> list[Any]:
    answers = ranks.collect(tickets, timeout_s)
    for rank, ticket in enumerate(tickets):
        if ticket not in answers.values:
            why = answers.lost.get(ticket, f"no answer within {timeout_s:g} s (cluster.start_timeout_s)")
            raise RankLost(rank, f"rank {rank} did not start: {why}")
    return [answers.values[ticket] for ticket in tickets]
