"""What ranks send to each other, and how fast. No torch.

Bytes that one rank sends, of one block and one micro-batch: s tokens of the rank's sequence part, of itemsize e; t, u,
R degrees of tensor, ulysses and ring; Q = heads x head size; K = max(KV heads / t, u) x head size.

    tensor, with sequence parallel norms   4 (t - 1) / t s H e               that, and what backward gathers again
    ulysses                                (u - 1) / u s e (2 Q / t + 2 K)   the same again in backward
    ring                                   (R - 1) 2 s K e                   that, and R 2 s K 4 for the gradients
    weights (FSDP2), f shards              (f - 1) / f P e, once per gather  (f - 1) / f P 4 for the gradients, once

Latency is not counted, nor are the weights outside of the blocks. A group that spans nodes sends through the network
cards of all of its ranks of a node, except for the exchanges of ulysses and ring, where a rank's own card is the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from headrace.platform.planning.hardware import HardwareProfile
from headrace.platform.planning.simulate.engine import Stream
from headrace.storage.core.errors import InputError
from headrace.workers.model.config import ModelConfig
from headrace.workers.parallel.dims import Axis, ParallelDims

GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one block of one micro-batch. See the module."""

    tensor: float
    ulysses: float
    ring: float
    ring_backward: float


def traffic(model: ModelConfig, dims: ParallelDims, *, batch_tokens: int, itemsize: int) -> Traffic:
    """Of one block.

    Args:
        batch_tokens: of all rows of a micro-batch, not divided by any degree.
    """
    t, u, ring = dims.tensor, dims.ulysses, dims.ring
    tokens = batch_tokens / (ring * u)
    keys = max(model.num_kv_heads / t, u) * model.head_size
    queries = model.num_heads * model.head_size
    passed = 2 * tokens * keys
    return Traffic(
        tensor=4 * (t - 1) / t * tokens * model.hidden_size * itemsize,
        ulysses=(u - 1) / u * tokens * itemsize * (2 * queries / t + 2 * keys),
        ring=(ring - 1) * passed * itemsize,
        ring_backward=(ring - 1) * passed * itemsize + (ring * passed * GRADIENT_BYTES if ring > 1 else 0),
    )


@dataclass(frozen=True)
class Network:
    """Ranks on nodes.

    Args:
        ranks_per_node: ranks are dealt to nodes in order, tensor innermost (Axis).
    """

    dims: ParallelDims
    ranks_per_node: int
    profile: HardwareProfile

    def tensor(self) -> tuple[Stream, float]:
        """Stream and bytes per second of the gathers and scatters of a block's tokens."""
        return self._gathers("tensor", 1, self.dims.tensor)

    def ulysses(self) -> tuple[Stream, float]:
        """Of the exchange of heads for tokens: what goes to other nodes takes the rank's own card."""
        stride, degree = self.dims.tensor, self.dims.ulysses
        here = self._here(stride, degree)
        if here == degree:
            return Stream.node_network, self._node_rate("ulysses")
        return Stream.network, self._rate("ulysses") * (degree - 1) / (degree - here)

    def ring(self) -> tuple[Stream, float]:
        """Of the passing on of keys and values: the slowest hop sets the pace."""
        stride, degree = self.dims.tensor * self.dims.ulysses, self.dims.ring
        if self._here(stride, degree) == degree:
            return Stream.node_network, self._node_rate("ring")
        return Stream.network, self._rate("ring")

    def weights(self) -> tuple[Stream, float]:
        """Of gathers of weights and reductions of gradients over the ranks that shard them."""
        return self._gathers("fsdp", self.dims.tensor, self.dims.fsdp)

    def stages(self) -> tuple[Stream, float]:
        """Of what one pipeline stage sends to the next."""
        stride = math.prod(degree for axis, degree in self.dims.shape.items() if axis is not Axis.pipeline)
        if self._here(stride, self.dims.pipeline) == self.dims.pipeline:
            return Stream.node_network, self._node_rate("pipeline")
        return Stream.network, self._rate("pipeline")

    def _here(self, stride: int, degree: int) -> int:
        """Ranks of a group that are on one node."""
        return 1 if stride >= self.ranks_per_node else min(degree, max(1, self.ranks_per_node // stride))

    def _gathers(self, key: str, stride: int, degree: int) -> tuple[Stream, float]:
        here = self._here(stride, degree)
        if here == degree:
            return Stream.node_network, self._node_rate(key)
        outside = here * self._rate(key)
        return Stream.network, outside if here == 1 else min(outside, self._node_rate(key))

    def _node_rate(self, key: str) -> float:
        return self._known("node_network_gbps", self.profile.node_network_gbps, key)

    def _rate(self, key: str) -> float:
        return self._known("network_gbps", self.profile.network_gbps, key)

    def _known(self, name: str, gbps: float | None, key: str) -> float:
        rate = self.profile.link_bytes_per_s(gbps)
        if rate is None:
            raise InputError(
                f"parallel.{key}={getattr(self.dims, key)}: a timeline needs hardware.{name}, which is not known for "
                f"hardware={self.profile.name}; set it (GB/s of one device, one direction)"
            )
        return rate
