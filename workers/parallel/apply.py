"""Applies every strategy to a model, in the one order in which they work together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from headrace.storage.core.errors import InputError
from headrace.workers.memory.policy import MemoryHandle
from headrace.workers.memory.sweeps import apply_plan
from headrace.workers.parallel.pipeline.vocabulary import shared_rows
from headrace.workers.parallel.row_cut import chunk_problems
from headrace.workers.parallel.tensor import share_weights
from headrace.workers.parallel.ulysses import ContextGroup, share_blocks
from headrace.workers.train.config import Precision

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from headrace.storage.stack import TierStack
    from headrace.workers.memory.meter import Meter
    from headrace.workers.memory.plan import MemoryPlan


def parallelize(
    model: nn.Module,
    *,
    mesh: DeviceMesh,
    precision: Precision,
    context: ContextGroup | None = None,
    plan: MemoryPlan,
    stack: TierStack | None = None,
    meter: Meter | None = None,
    bucket_plans: Mapping[int, MemoryPlan] | None = None,
    layers: Sequence[int] | None = None,
) -> MemoryHandle:
    """Turn a plain model into this rank's part of a sharded one that follows a memory plan. In place.

    1. Parameters become DTensors over the tensor axis, and the vocabulary's rows are shared.
    2. The blocks' programs become those of the context group: they have its gathers, exchanges and passes then.
    3. The memory policy replaces `block.forward`. Before FSDP2, so that FSDP2's hooks, which sit on `__call__`, stay
       outside of what runs again: a recompute finds the weights gathered and does not gather them twice.
    4. FSDP2 over each block, then over the rest. A block gives its gathered weights back after its forward; the rest
       (embedding, final norm, head) is needed first again in backward and keeps them.

    Args:
        model: with `.blocks`; on meta or on the rank's device. fp32: what is sharded is the master copy.
        precision: bf16 gathers and computes in bf16 and still reduces and accumulates gradients in fp32.
        context: this rank among those that share its rows or its weights; None: it has whole ones.
        stack, meter, bucket_plans: as for apply_memory; lengths are those of whole rows.
        layers: numbers of the blocks, where they are the stages of one rank of a pipeline. Those keep their gathered
            weights until the last backward of the step.

    Returns:
        The handle of the memory policy.

    Raises:
        InputError: the ranks cannot share the chunks of a plan by chunk.
    """
    blocks: nn.ModuleList = model.blocks  # type: ignore[assignment]
    if context is not None:
        for each in (plan, *(bucket_plans or {}).values()):
            _check_chunks(each, context)
        if context.tensor is not None:
            context = replace(context, tensor=share_weights(model, context.tensor))
        share_blocks(list(blocks), context)
    rank_plans = of_rank_lengths(bucket_plans or {}, context)
    handle = apply_plan(model, plan, stack, meter=meter, bucket_plans=rank_plans, layers=layers)
    apply_fsdp(model, blocks=list(blocks), mesh=mesh, precision=precision, gathers_once=layers is not None)
    return handle


def _check_chunks(plan: MemoryPlan, context: ContextGroup) -> None:
    """Refuse a plan by chunk whose chunks these ranks cannot share."""
    found = chunk_problems(plan.name, context.degrees, sizes=plan.cuts.chunks, has_pages=plan.pages is not None)
    if plan.cuts.chunks and (problem := next(found, None)):
        raise InputError(f"the plan {problem}")


def of_rank_lengths(plans: Mapping[int, MemoryPlan], context: ContextGroup | None) -> dict[int, MemoryPlan]:
    """From plans by the tokens of whole rows those by the tokens that one rank has of them, by chunk as they are."""
    num_ranks = 1 if context is None else context.num_ranks
    return {length // (1 if plan.cuts.chunks else num_ranks): plan for length, plan in plans.items()}


def apply_fsdp(
    model: nn.Module,
    *,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    precision: Precision,
    gathers_once: bool = False,
) -> None:
    """FSDP2 (fully_shard) per block and over the rest, with gradients that are summed over ranks, not averaged.

    The rows of a vocabulary that the ranks of a pipeline share are left out: they are used outside of any forward.
    The loss is divided by the targets of the whole global batch before backward, so an average would divide twice.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision is Precision.bf16 else None,
        # In fp32; gradients of fp32 are not cast, and neither are those of fp64.
        reduce_dtype=torch.float32 if precision is Precision.bf16 else None,
        # The model itself decides what is fp32 inside (rotary tables, norms): no cast behind its back.
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not gathers_once)
    apart = shared_rows(model)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=apart or None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() > 1:
                # For one rank torch divides a copy of the gradients, in fp32 and at the memory's peak: 4 GiB for the
                # embeddings of a 7B model. Without a factor one rank divides by 1, which is left out.
                module.set_gradient_divide_factor(1.0)
            # Plain SUM on the wire: a factor of 1 would otherwise become PREMUL_SUM (which gloo lacks), or AVG.
            module.set_force_sum_reduction_for_comms(True)
