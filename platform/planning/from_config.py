"""The planner's question out of a run's configuration. Pure: reads no file, asks no machine. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.platform.planning.request import GIB, PlanRequest
from headrace.storage.core.errors import InputError
from headrace.workers.train.config import Precision

if TYPE_CHECKING:
    from headrace.platform.config.schema import RunConfig

ITEMSIZE = {Precision.fp32: 4, Precision.bf16: 2}


def request_from_config(config: RunConfig, vocab_size: int) -> PlanRequest:
    """What solve_plan is asked for this run, seen from one rank.

    Args:
        vocab_size: of the prepared data or its tokenizer; used where model.vocab_size is 0.

    Raises:
        InputError: degrees that do not make up the ranks, or one that the planner does not know.
    """
    cluster, train, tiers = config.cluster, config.train, config.tiers
    ranks_per_node = cluster.ranks_per_node
    model = config.model if config.model.vocab_size else replace(config.model, vocab_size=vocab_size)
    sequence_degree = config.parallel.ulysses * config.parallel.ring
    return PlanRequest(
        model=model,
        seq_len=config.data.seq_len,
        profile=config.hardware,
        preset=config.memory.preset,
        batch_size=train.batch_size,
        micro_batches=train.micro_batches,
        itemsize=ITEMSIZE[train.precision],
        device_budget_bytes=budget_bytes(tiers.device.budget_gib),
        host_budget_bytes=budget_bytes(tiers.host.budget_gib, ranks_per_node),
        ssd_budget_bytes=budget_bytes(tiers.ssd.budget_gib, ranks_per_node),
        ranks_per_node=ranks_per_node,
        num_shards=num_shards(config),
        tensor_degree=config.parallel.tensor,
        sequence_degree=sequence_degree,
        # Documents are packed into rows unless one fills the row; the planner expects the more that packing leaves.
        packed=True,
        prefetch_layers=config.memory.prefetch_layers,
        loss_tile=train.loss_tile,
    )


def budget_bytes(budget_gib: float | None, num_sharers: int = 1) -> int | None:
    """GiB as the user wrote them, as bytes of one of `num_sharers`; None stays None."""
    return None if budget_gib is None else round(budget_gib * GIB) // num_sharers


def num_shards(config: RunConfig) -> int:
    """Ranks that weights, gradients and optimizer state are sharded over.

    Raises:
        InputError: see request_from_config.
    """
    parallel, num_ranks = config.parallel, config.cluster.num_ranks
    if parallel.pipeline > 1:
        raise InputError(
            f"parallel.pipeline={parallel.pipeline}: the planner has no model of pipeline stages yet; set "
            "parallel.pipeline=1"
        )
    others = math.prod((parallel.tensor, parallel.ulysses, parallel.ring))
    data = num_ranks // others if parallel.data is None else parallel.data
    if data * others != num_ranks:
        raise InputError(f"parallel: {data} x {others} ranks, the run has {num_ranks}; set parallel.data accordingly")
    return parallel.fsdp or data * parallel.ulysses * parallel.ring
