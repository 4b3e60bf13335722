"""FSDP2 over gloo: sums over ranks, shards, replicas, bf16, against the same model in one plain process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.helpers.training import run_distributed
from headrace.workers.job import RankContext
from headrace.workers.parallel.apply import apply_fsdp
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.parallel.dims import Axis, ParallelDims, resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.process_group import process_group
from headrace.workers.train.config import Precision

CPU, NUM_MICRO_BATCHES = torch.device("cpu"), 3


class Residual(nn.Module):
    """Three blocks (odd sizes: shards are uneven) between an embedding and a tied head; a sum of token losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(9, 9), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(9, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1, 1).flatten(), reduction="sum")


def batch(rank: int, micro_batch: int) -> torch.Tensor:
    return torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(10 * rank + micro_batch))


def sharded_gradients(context: RankContext, fsdp: int, precision: Precision, sync: bool = True) -> dict[str, Any]:
    """Gradients of all micro-batches of all ranks, gathered; the shapes this rank holds; the mesh."""
    torch.set_num_threads(1)
    with process_group(context, CPU):
        dims = resolve_dims(ParallelConfig(fsdp=fsdp), context.world_size)
        model = Residual()
        apply_fsdp(model, blocks=list(model.blocks), mesh=Meshes.build(dims, "cpu").params, precision=precision)
        for micro_batch in range(NUM_MICRO_BATCHES):
            model.set_requires_gradient_sync(sync and micro_batch == NUM_MICRO_BATCHES - 1)
            model(batch(context.rank, micro_batch)).backward()
        found = {}
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            assert param.dtype == torch.float32
            grad = param.grad.full_tensor() if param.grad is not None else None
            found[name] = (grad, tuple(param.to_local().shape), dims.num_replicas)
        return found


def plain_gradients(num_ranks: int) -> dict[str, torch.Tensor]:
    model = Residual().double()
    for rank in range(num_ranks):
        for micro_batch in range(NUM_MICRO_BATCHES):
            x = batch(rank, micro_batch)
            model(x).backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "fsdp", "precision", "bound"),
    [
        (1, 1, Precision.fp32, 1e-6),
        (2, 2, Precision.fp32, 1e-6),
        (2, 1, Precision.fp32, 1e-6),
        (2, 2, Precision.bf16, 2e-2),
    ],
    ids=["one", "shard", "replicate", "bf16"],
)
def test_gradients_are_summed_over_ranks_and_micro_batches(
    world_size: int, fsdp: int, precision: Precision, bound: float
) -> None:
    expected = plain_gradients(world_size)
    ranks = run_distributed(partial(sharded_gradients, fsdp=fsdp, precision=precision), world_size)
    for found in ranks:
        assert sorted(found) == sorted(expected)
        for name, (grad, _, num_replicas) in found.items():
            assert num_replicas == world_size // fsdp
            assert grad.dtype == torch.float32
            error = (grad.double() - expected[name]).norm() / expected[name].norm()
            assert error < bound, (name, float(error))
    rows = [found["embed.weight"][1][0] for found in ranks]
    assert sum(rows) == 13 * world_size // fsdp
    assert all(torch.equal(ranks[0][name][0], other[name][0]) for other in ranks for name in expected)


def test_mutant_a_group_that_never_synchronises_has_no_gradient() -> None:
    ranks = run_distributed(partial(sharded_gradients, fsdp=2, precision=Precision.fp32, sync=False), 2)
    assert all(grad is None for found in ranks for grad, _, _ in found.values())


class Divisions(TorchDispatchMode):
    """Counts quotients of whole tensors: each is a temporary as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar) and args[0].numel() > 1:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def divisions_of_a_step(context: RankContext) -> list[str]:
    torch.set_num_threads(1)
    with process_group(context, CPU):
        model = Residual()
        mesh = Meshes.build(resolve_dims(ParallelConfig(), context.world_size), "cpu").params
        apply_fsdp(model, blocks=list(model.blocks), mesh=mesh, precision=Precision.fp32)
        loss = model(batch(context.rank, 0))
        with Divisions() as divisions:
            loss.backward()
        return divisions.found


def test_one_rank_makes_no_divided_copy_of_its_gradients() -> None:
    assert run_distributed(divisions_of_a_step, 1) == [[]]


def sums_by_axis(context: RankContext, dims: ParallelDims) -> list[float]:
    """10 to the power of the rank, added up over the data axis, the tensor axis, both, and one of degree 1."""
    with process_group(context, CPU):
        meshes = Meshes.build(dims, "cpu")
        found = []
        for axes in ((Axis.data,), (Axis.tensor,), (Axis.tensor, Axis.data), (Axis.ring,)):
            values = torch.tensor([1.0, 10.0**context.rank], dtype=torch.float64)
            meshes.add_up(values[1:], *axes)
            assert values[0] == 1.0
            found.append(float(values[1]))
        return found


def test_a_reduction_adds_up_the_ranks_of_its_axes_and_no_others() -> None:
    found = run_distributed(partial(sums_by_axis, dims=ParallelDims(data=2, fsdp=2, tensor=2)), 4)
    assert [sums[0] for sums in found] == [101.0, 1010.0, 101.0, 1010.0]
    assert [sums[1] for sums in found] == [11.0, 11.0, 1100.0, 1100.0]
    assert [sums[2] for sums in found] == [1111.0] * 4
    assert [sums[3] for sums in found] == [1.0, 10.0, 100.0, 1000.0]
