"""The vocabulary over several ranks, even and uneven, down to ranks that hold no row; DTensor weights."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import ChunkAxis, FilterStats, LossOptions, WeightSum, linear_cross_entropy
from headrace.kernels.loss import shards
from headrace.storage.core.ports import free_port

NUM_TOKENS, WIDTH, VOCAB = 11, 5, 23
TOKENS = LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=4)
VOCABULARY = LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=4, columns_per_chunk=3)
CUTS = {1: [23], 2: [12, 11], 3: [0, 20, 3], 7: [1, 4, 0, 9, 2, 7, 0]}
TERMS = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.05}


class Threads:
    """torch.distributed over threads of one process: the collectives that shards.py calls."""

    ReduceOp = dist.ReduceOp

    def __init__(self, world_size: int) -> None:
        self.world_size, self.barrier = world_size, threading.Barrier(world_size, timeout=600)
        self.own, self.slots = threading.local(), [None] * world_size

    def get_rank(self, group: Any) -> int:
        return self.own.rank

    def get_world_size(self, group: Any) -> int:
        return self.world_size

    def exchange(self, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[self.own.rank] = tensor.clone()
        self.barrier.wait()
        every = torch.stack(self.slots)
        self.barrier.wait()
        return every

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        every = self.exchange(tensor)
        tensor.copy_(every.amax(0) if op == dist.ReduceOp.MAX else every.sum(0))

    def all_gather(self, out: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
        for slot, other in zip(out, self.exchange(tensor), strict=True):
            slot.copy_(other)

    def run(self, call: Callable[[int], Any]) -> list[Any]:
        """call(rank) on every rank; what each returned, or the first error."""
        found: list[Any] = [None] * self.world_size

        def rank_main(rank: int) -> None:
            self.own.rank = rank
            try:
                found[rank] = call(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Threads]:
    def make(world_size: int) -> Threads:
        threads = Threads(world_size)
        monkeypatch.setattr(shards, "dist", threads)
        return threads

    return make


def problem(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    """hidden, weight, bias, class_weight; targets on every border of every cut, some ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((NUM_TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    leaves = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    class_weight = torch.rand(VOCAB, dtype=torch.float64, generator=generator).to(dtype)
    return [*leaves, class_weight], torch.tensor([0, 11, 12, 22, 19, 20, -100, 4, 5, 14, -100])


def on_slices(
    rank: int, sizes: list[int], tensors: list[torch.Tensor], targets: torch.Tensor, group: Any, **call: Any
) -> list[torch.Tensor]:
    """One rank's loss, gradient of hidden, and gradients of its slice of weight and bias."""
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    hidden, weight, bias, class_weight = tensors
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight[mine], bias[mine])]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], class_weight=class_weight[mine], group=group, **call
    )
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("world_size", CUTS)
@pytest.mark.parametrize(("options", "reduction"), [(TOKENS, "mean"), (VOCABULARY, "mean"), (VOCABULARY, "none")])
def test_any_number_of_shards_gives_the_same(ranks, oracle, world_size, options, reduction) -> None:
    tensors, targets = problem()
    sizes, call = CUTS[world_size], {"reduction": reduction, **TERMS}
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    exact = oracle(leaves[0], leaves[1], targets, bias=leaves[2], class_weight=tensors[3], **call)
    upstream = torch.linspace(0.5, 2, exact.numel(), dtype=exact.dtype).view(exact.shape)
    expected = [exact.detach(), *torch.autograd.grad(exact, leaves, upstream)]

    threads = ranks(world_size)
    found = threads.run(lambda rank: on_slices(rank, sizes, tensors, targets, "group", options=options, **call))
    assert not any(isinstance(one, Exception) for one in found), found
    for loss, d_hidden, *_ in found:
        assert rel_error(loss, expected[0]) < 1e-13
        assert rel_error(d_hidden, expected[1]) < 1e-13
    assert rel_error(torch.cat([one[2] for one in found]), expected[2]) < 1e-13
    assert rel_error(torch.cat([one[3] for one in found]), expected[3]) < 1e-13


def test_mutant_input_gradient_not_added_over_the_ranks_fails(ranks, monkeypatch) -> None:
    tensors, targets = problem()
    whole = on_slices(0, [VOCAB], tensors, targets, None, options=VOCABULARY)
    monkeypatch.setattr(shards.Shard, "sum_", lambda self, tensor: tensor)
    found = ranks(2).run(lambda rank: on_slices(rank, CUTS[2], tensors, targets, "group", options=VOCABULARY))
    assert rel_error(found[0][1], whole[1]) > 0.1


def test_the_auto_axis_and_cut_are_those_of_the_largest_shard(ranks) -> None:
    """Ranks that cut their tokens differently would wait for each other for ever."""
    tensors, targets = problem(torch.float32)
    options = LossOptions(workspace_bytes=2000)
    found = ranks(3).run(lambda rank: on_slices(rank, CUTS[3], tensors, targets, "group", options=options))
    assert not any(isinstance(one, Exception) for one in found), found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rank, call: call.update(targets=call["targets"].roll(rank)), "targets: the ranks of the group score"),
        (lambda rank, call: call.update(targets=torch.full_like(call["targets"], VOCAB)), "label 23 at index 0"),
    ],
)
def test_ranks_that_disagree_are_all_told(ranks, change, words) -> None:
    tensors, targets = problem()

    def call(rank: int) -> list[torch.Tensor]:
        arguments = {"targets": targets}
        change(rank, arguments)
        return on_slices(rank, CUTS[2], tensors, group="group", **arguments)

    for error in ranks(2).run(call):
        assert isinstance(error, ValueError)
        assert words in str(error)


def gloo_rank(rank: int, port: int) -> None:
    """Both cases on two real ranks: vocabulary shards, and DTensor weights of ranks with the same or other tokens."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    try:
        sharded_vocabulary(rank)
        sharded_parameters(rank)
    finally:
        dist.destroy_process_group()


def sharded_vocabulary(rank: int) -> None:
    tensors, targets = problem()
    whole = on_slices(0, [VOCAB], tensors, targets, None, **TERMS)
    for sizes in ([20, 3], [0, 23]):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for options in (TOKENS, VOCABULARY):
            got = on_slices(rank, sizes, tensors, targets, dist.group.WORLD, options=options, **TERMS)
            expected = [whole[0], whole[1], whole[2][mine], whole[3][mine]]
            assert max(rel_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-13
    stats = FilterStats()
    kept = torch.tensor([[rank == 0]])
    stats.add(kept, slice(0, 5 + rank), 5 + rank)
    summary = stats.summary(dist.group.WORLD)
    assert (summary.keep_rate, summary.num_starved_rows, summary.num_rows) == (0.5, 6, 11)


def sharded_parameters(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    (hidden, weight, bias, _), targets = problem()
    exact = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    linear_cross_entropy(exact[0], exact[1], targets, bias=exact[2]).backward()

    # The same tokens on both ranks: each has the whole gradient.
    sharded = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias)]
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, sharded[0], targets, bias=sharded[1]).backward()
    assert rel_error(leaf.grad, exact[0].grad) < 1e-13
    for parameter, expected in zip(sharded, exact[1:], strict=True):
        assert parameter.grad.placements == (Shard(0),)
        assert rel_error(parameter.grad.full_tensor(), expected.grad) < 1e-13

    # Tokens of its own on each rank, as data parallel has it: their gradients are added.
    count = int((targets != -100).sum())
    rows = slice(0, 5) if rank == 0 else slice(5, NUM_TOKENS)
    options = LossOptions(weight_sum=WeightSum.sum)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight.data.copy_(weight)
    fully_shard(head, mesh=mesh)
    loss = linear_cross_entropy(hidden[rows], head.weight, targets[rows], num_valid=count, options=options)
    loss.backward()
    plain = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, plain, targets).backward()
    assert rel_error(head.weight.grad.full_tensor(), plain.grad) < 1e-13
    with pytest.raises(ValueError, match=r"weight_sum=WeightSum\.sum"):
        linear_cross_entropy(hidden[rows], head.weight, targets[rows])
    with pytest.raises(ValueError, match="weight: a DTensor, with group"):
        linear_cross_entropy(hidden, head.weight, targets, group=dist.group.WORLD)


@pytest.mark.slow
def test_two_gloo_ranks() -> None:
    port = free_port()
    other = subprocess.Popen([sys.executable, __file__, "1", str(port)])
    try:
        gloo_rank(0, port)
        assert other.wait(timeout=300) == 0
    finally:
        other.kill()


if __name__ == "__main__":
    gloo_rank(int(sys.argv[1]), int(sys.argv[2]))
