"""What a run's configuration asks of the planner. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from headrace.kernels.backend import AttentionOperator
from headrace.platform.control.config import Launcher
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.endurance import TB, YEAR_S
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.train.config import Precision

if TYPE_CHECKING:
    from headrace.platform.config.schema import RunConfig

ITEMSIZE = {Precision.fp32: 4, Precision.bf16: 2}


def request_from_config(config: RunConfig, vocab_size: int) -> PlanRequest:
    """What solve_plan is asked for this run, seen from one rank. Pure: reads no file, asks no machine.

    Args:
        vocab_size: of the prepared data or its tokenizer; used where model.vocab_size is 0.

    Raises:
        InputError: degrees that do not make up the ranks, or one that the planner does not know.
    """
    cluster, train, tiers = config.cluster, config.train, config.tiers
    ranks_per_node, dims = cluster.ranks_per_node, resolve_dims(config.parallel, cluster.num_ranks)
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
        launcher=cluster.launcher,
        num_shards=dims.fsdp,
        num_replicas=dims.num_replicas,
        tensor_degree=config.parallel.tensor,
        sequence_degree=sequence_degree,
        ulysses=config.parallel.ulysses,
        ring_layout=config.parallel.ring_layout,
        # Documents are packed into rows unless one fills the row; the planner expects the more that packing leaves.
        packed=True,
        prefetch_layers=config.memory.prefetch_layers,
        loss_tile=train.loss_tile,
        deterministic=train.deterministic,
        adapter=config.adapter,
        seq_len_step=sequence_degree * config.parallel.tensor,
        chunk_size=config.chunk_size,
        sparse=config.memory.sparse,
        gradient_copies=2 if config.checkpoint.every_chunks else 1,
        head_groups=config.memory.head_groups,
        codec=config.memory.codec,
        buckets=tuple(config.data.buckets),
        ssd_wear_bytes_per_s=wear_bytes_per_s(tiers.ssd.endurance, ranks_per_node),
        pinned=pinned_keys(config),
    )


def wear_bytes_per_s(endurance: EnduranceConfig, num_ranks: int) -> float | None:
    """What one of the ranks of a node may write, so that the drives last as long as wanted; None: no rating is set."""
    if endurance.rated_tbw is None:
        return None
    return endurance.rated_tbw * TB / (endurance.lifetime_years * YEAR_S) / num_ranks


def pinned_keys(config: RunConfig) -> tuple[str, ...]:
    """Keys that this configuration cannot change alone: another one says what they must be."""
    train, cluster, parallel = config.train, config.cluster, config.parallel
    ranks_are_fixed = cluster.launcher is Launcher.inline or cluster.num_workers is not None
    found = {
        "data.seq_len": config.data.prepared is not None or bool(config.data.buckets),
        "model.num_layers": config.model.init_from is not None,
        "cluster": ranks_are_fixed or parallel.data is not None or parallel.fsdp is not None,
        "train.precision": train.attention not in (AttentionOperator.auto, AttentionOperator.reference),
        "memory": config.checkpoint.every_chunks > 0,
    }
    return tuple(key for key, is_fixed in found.items() if is_fixed)


def budget_bytes(budget_gib: float | None, num_sharers: int = 1) -> int | None:
    """GiB as the user wrote them, as bytes of one of `num_sharers`; None stays None."""
    return None if budget_gib is None else round(budget_gib * GIB) // num_sharers
