"""Vocabulary shards: each rank of a group holds consecutive rows of the classifier, in rank order, evenly or not.

Forward takes two all-reduces per cut along the tokens: of the maximum, then of the sum of exp, the label's logit and
(with label smoothing) the sum of logits, N numbers each. Backward adds the input gradient over the group in the dtype
of the sums (fp32). Vocabulary parallelism: arXiv 2411.05288.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from headrace.kernels.loss.steps import BlockStats
from headrace.kernels.merge import merge_max_sum


@dataclass(frozen=True)
class Shard:
    """This rank's slice of the vocabulary.

    first: its first row in the whole vocabulary. num_rows: its rows. vocab_size: rows of all shards. largest: rows of
    the largest shard. group: None where the weight is whole. on_sent: called with bytes that this rank sends.
    """

    first: int
    num_rows: int
    vocab_size: int
    largest: int
    group: dist.ProcessGroup | None = None
    on_sent: Callable[[int], None] | None = None

    def merge(self, stats: BlockStats) -> BlockStats:
        """Statistics of this rank's columns to those of all."""
        if self.group is None:
            return stats
        largest = self._reduce(stats.max.clone(), dist.ReduceOp.MAX)
        # This rank's sum, relative to the maximum of all: merged with an empty set that has it.
        _, sum_exp = merge_max_sum(stats.max, stats.sum_exp, largest, torch.zeros_like(largest))
        sums = [sum_exp, stats.picked] if stats.total is None else [sum_exp, stats.picked, stats.total]
        together = self._reduce(torch.stack(sums), dist.ReduceOp.SUM)
        total = None if stats.total is None else together[2]
        return BlockStats(largest, together[0], together[1], total)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add over the ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
            if self.on_sent is not None:
                self.on_sent(all_reduced_bytes(tensor.nbytes, self.group.size()))
        return tensor


def all_reduced_bytes(num_bytes: int, num_ranks: int) -> int:
    """What a rank sends in an all-reduce of so many bytes: a reduce-scatter and an all-gather."""
    return 2 * (num_ranks - 1) * num_bytes // num_ranks


def find_shard(weight: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None) -> Shard:
    """Where this rank's rows lie; one small all-gather.

    Raises:
        ValueError: on every rank, where ranks score different tokens or differ in the width of the weight.
    """
    num_rows, width = weight.shape
    if group is None:
        return Shard(0, num_rows, num_rows, num_rows)
    own = torch.cat((torch.tensor([num_rows, width], device=weight.device), fingerprint(targets).to(weight.device)))
    world_size = dist.get_world_size(group)
    every = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(every, own, group=group)
    rows = torch.stack(every).tolist()
    if any(row[1] != width for row in rows):
        raise ValueError(f"weight: widths {[row[1] for row in rows]} over the ranks of the group: expected one width")
    if any(row[2:] != rows[0][2:] for row in rows):
        counts = [row[2] for row in rows]
        raise ValueError(
            f"targets: the ranks of the group score different tokens ({counts} of them): expected the same hidden and "
            "targets on every rank, each with its own rows of the vocabulary"
        )
    sizes = [row[0] for row in rows]
    return Shard(sum(sizes[: dist.get_rank(group)]), num_rows, sum(sizes), max(sizes), group)


def fingerprint(targets: torch.Tensor) -> torch.Tensor:
    """(3,) int64 that tells other targets apart: their number, their sum, their sum weighted by position."""
    flat = targets.reshape(-1)
    number = torch.tensor(flat.numel(), device=flat.device)
    # Wraps around; ranks wrap alike.
    position = torch.arange(1, flat.numel() + 1, device=flat.device)
    return torch.stack((number, flat.sum(dtype=torch.int64), (flat * position).sum(dtype=torch.int64)))
