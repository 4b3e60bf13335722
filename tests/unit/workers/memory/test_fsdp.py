"""The policies and the meter under FSDP2 on one gloo rank: it unshards, reshards and reduces around what runs again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from headrace.helpers.training import (
    FOREIGN_HOST,
    FOREIGN_KEEP,
    FOREIGN_RECOMPUTE,
    FOREIGN_SSD,
    foreign_plan,
    input_bytes_moved,
)
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.policy import apply_memory

HOST, SSD = FOREIGN_HOST, FOREIGN_SSD
MIXED = MemoryPlan("mixed", (SSD, HOST, FOREIGN_RECOMPUTE, FOREIGN_KEEP))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: Any, param_dtype: torch.dtype | None, *, nested: bool = False) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        if nested:
            fully_shard(block.up, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def train(model: nn.Module, plan: MemoryPlan, stack: Any, tokens: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Two SGD steps of two micro-batches; losses, gradients and the metered peak."""
    torch.manual_seed(11)
    meter, seen = DeviceMeter(parameters=model.parameters()), []
    handle = apply_memory(model.blocks, plan, stack, meter=meter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(2):
        for micro_batch in range(2):
            model.set_requires_gradient_sync(micro_batch == 1)
            handle.begin(step, micro_batch)
            with meter:
                loss = model(tokens.roll(micro_batch, 1))
                loss.backward()
            handle.end()
            assert meter.resident_bytes == 0
            seen.append(loss.detach())
        seen += [p.grad.to_local().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return seen, meter.peak_bytes


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "plan", [foreign_plan("recompute", 4), foreign_plan("offload_host", 4), MIXED], ids=lambda p: p.name
)
def test_bits_and_bytes_under_fsdp2(plan, param_dtype, make_model, tokens, scripted_stack, mesh) -> None:
    reference, _ = train(shard(make_model(), mesh, param_dtype), foreign_plan("keep", 4), None, tokens)
    seen, _ = train(shard(make_model(), mesh, param_dtype), plan, scripted_stack, tokens)
    assert all(torch.equal(a, b) for a, b in zip(seen, reference, strict=True))
    itemsize = 2 if param_dtype is torch.bfloat16 else 4
    for direction in Direction:
        expected = input_bytes_moved(plan, 2 * 8 * 16 * itemsize, micro_batches=4, direction=direction)
        assert {m: scripted_stack.moved[direction.value, m] for m in (Medium.host, Medium.ssd)} == expected


@pytest.mark.parametrize("param_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("nested", [False, True], ids=["block", "nested"])
def test_saved_tensors_leave_and_unsharded_weights_stay(nested, param_dtype, make_model, scripted_stack, mesh) -> None:
    tokens = torch.randint(0, 31, (2, 32), generator=torch.Generator().manual_seed(7))
    away = LayerPlan.of(x=Residence.host, saved=Residence.host)
    plan = MemoryPlan("saved", (away, away, away, FOREIGN_KEEP))
    reference, kept = train(shard(make_model(), mesh, param_dtype), foreign_plan("keep", 4), None, tokens)
    seen, peak = train(shard(make_model(), mesh, param_dtype, nested=nested), plan, scripted_stack, tokens)
    assert all(torch.equal(a, b) for a, b in zip(seen, reference, strict=True))
    assert peak < kept
    # Per token of the 64: the input, the norm's output, and three of four times the width of 16; the dropout's mask is
    # one of them.
    itemsize = 2 if param_dtype is torch.bfloat16 else 4
    stored = {m: scripted_stack.moved["store", m] for m in (Medium.host, Medium.ssd)}
    narrow = 2 * 16 * itemsize if 64 * 16 * itemsize >= 4096 else 0
    assert stored == {Medium.host: 4 * 3 * 64 * (narrow + 3 * 64 * itemsize), Medium.ssd: 0}


def test_unsharded_parameters_do_not_count(make_model, tokens, mesh) -> None:
    plain, peaks = make_model(), []
    meter = DeviceMeter()
    with meter:
        plain(tokens).backward()
    peaks.append(meter.peak_bytes)
    peaks.append(train(shard(make_model(), mesh, None), foreign_plan("keep", 4), None, tokens)[1])
    assert peaks[0] == peaks[1]
