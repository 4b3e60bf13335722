"""What ranks that share rows or weights send each other, counted in bytes."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist

from headrace.kernels.loss.shards import all_reduced_bytes

TENSOR, ULYSSES, RING, PIPELINE = "tensor", "ulysses", "ring", "pipeline"
# Before torch 2.13 they have other names, which are deprecated from then on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Traffic:
    """Bytes that this rank has sent, by the axis."""

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()

    def add(self, axis: str, num_bytes: int) -> None:
        """Count bytes that are sent."""
        self._sent[axis] += num_bytes

    def take(self) -> dict[str, int]:
        """Bytes since the last call, by axis."""
        sent, self._sent = dict(self._sent), Counter()
        return sent


def all_to_all(parts: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic) -> torch.Tensor:
    """Send part i to rank i of the group.

    Args:
        parts: (ranks, ...), contiguous.

    Returns:
        (ranks, ...): from every rank what it sent here.
    """
    count = parts.shape[0]
    traffic.add(ULYSSES, parts.nbytes // count * (count - 1))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def all_gather(tensor: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic) -> torch.Tensor:
    """What every tensor rank has, (ranks, ...) of contiguous (...): each sends its own to all others."""
    count = group.size()
    traffic.add(TENSOR, tensor.nbytes * (count - 1))
    received = tensor.new_empty((count * tensor.shape[0], *tensor.shape[1:]))
    _all_gather(received, tensor, group=group)
    return received.unflatten(0, (count, -1))


def post_all_gather(tensor: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    """Post what every rank of a group has, (ranks, ...) of contiguous (...): it is there when the work is over."""
    received = tensor.new_empty((group.size() * tensor.shape[0], *tensor.shape[1:]))
    work = _all_gather(received, tensor, group=group, async_op=True)
    return received.unflatten(0, (group.size(), -1)), work


def reduce_scatter(parts: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic) -> torch.Tensor:
    """The sum over the tensor ranks of the part that is for this one: (...) of (ranks, ...), contiguous."""
    count = group.size()
    traffic.add(TENSOR, parts.nbytes // count * (count - 1))
    received = torch.empty_like(parts[0])
    _reduce_scatter(received, parts.flatten(0, 1), group=group)
    return received


def all_reduce_(tensor: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic) -> torch.Tensor:
    """Add up over the tensor ranks, in place: as many bytes as a scatter and a gather."""
    traffic.add(TENSOR, all_reduced_bytes(tensor.nbytes, group.size()))
    dist.all_reduce(tensor, group=group)
    return tensor


class Passing:
    """A tensor on its way to another rank of a ring, while one of the same shape comes in. Posted when it is made.

    Args:
        to / source: places in the group.
    """

    def __init__(
        self, tensor: torch.Tensor, group: dist.ProcessGroup, traffic: Traffic, *, to: int, source: int
    ) -> None:
        traffic.add(RING, tensor.nbytes)
        self._sent, self._received = tensor, torch.empty_like(tensor)
        there, here = (dist.get_global_rank(group, place) for place in (to, source))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, tensor, there, group),
                dist.P2POp(dist.irecv, self._received, here, group),
            ]
        )

    def wait(self) -> torch.Tensor:
        """What came in. The tensor that was sent may be written to from then on."""
        for work in self._works:
            work.wait()
        return self._received
