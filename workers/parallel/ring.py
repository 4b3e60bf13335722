"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values pass from rank to rank, queries stay.

    forward    K and V move to the right `hops` times; the partial results merge by their LSE, which is fp64
    backward   K and V move again; dK and dV, in fp32 (fp64 for fp64), move with them and come home at the end

Every exchange is posted before the keys at hand are computed with. Places are those of the whole row, so documents,
windows and every layout are the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from headrace.kernels.attention.spans import SpanAttention, SpanGradient
from headrace.kernels.attention.spec import AttentionSpec
from headrace.workers.parallel.collectives import Passing, Traffic
from headrace.workers.parallel.context import SplitPacking
from headrace.workers.parallel.ring_cut import Chunk, RingCut
from headrace.workers.parallel.row_cut import Span


@dataclass
class Ring:
    """This rank in its ring.

    Args:
        rank / size: its place, and how many there are.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    traffic: Traffic
    _cut: tuple[SplitPacking, RingCut] | None = field(default=None, init=False)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        queries: Sequence[Span],
        spec: AttentionSpec,
        packing: SplitPacking,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of some of this rank's queries over the keys of the whole ring; all ranks call alike.

        Args:
            q: (B, m, Hq, D): the stretches `queries` of the rank's tokens, one behind the other.
            k, v: (B, n, Hkv, D), of all the rank's tokens.
            spec: of whole rows of `packing.seq_len` tokens.

        Returns:
            out (B, m, Hq, D) in the dtype of q, lse (B, Hq, m) fp32 (fp64 for fp64).
        """
        cut = self._cut_of(packing, q.shape[0], spec.window)
        wide = _wide(q.dtype)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.float64, device=q.device)
        works = [
            SpanAttention(q[chunk.here], _spec_of(chunk, spec), out[chunk.here], _of_lse(lse, chunk))
            for chunk in cut.queries(self.rank, queries)
        ]
        keys = torch.stack((k, v))
        for step in range(packing.hops + 1):
            passing = self._pass(keys, 1) if step < packing.hops else None
            for meeting in cut.meetings(self.rank, queries, (self.rank - step) % self.size):
                near_k, near_v = keys[0][meeting.keys.here], keys[1][meeting.keys.here]
                works[meeting.query].add(near_k, near_v, meeting.keys.span[0], meeting.pieces)
            if passing is not None:
                keys = passing.wait()
        return out.to(q.dtype), lse.to(wide)

    def backward(
        self, tensors: Sequence[torch.Tensor], lse: torch.Tensor, spec: AttentionSpec, packing: SplitPacking
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of `forward` with all the rank's queries; all ranks call alike.

        Args:
            tensors: dout, q (B, n, Hq, D), k, v (B, n, Hkv, D), out (B, n, Hq, D). lse: (B, Hq, n).

        Returns:
            dq, dk, dv in the dtype of q.
        """
        dout, q, k, v, out = tensors
        cut, queries = self._cut_of(packing, q.shape[0], spec.window), [(0, q.shape[1])]
        dq = torch.zeros(q.shape, dtype=_wide(q.dtype), device=q.device)
        works = [
            SpanGradient(
                dout[chunk.here],
                q[chunk.here],
                out[chunk.here],
                _of_lse(lse, chunk),
                spec=_spec_of(chunk, spec),
                dq=dq[chunk.here],
            )
            for chunk in cut.queries(self.rank, queries)
        ]
        keys = torch.stack((k, v))
        travelling: Passing | None = None
        for step in range(packing.hops + 1):
            passing = self._pass(keys, 1) if step < packing.hops else None
            grads = torch.zeros((2, *k.shape), dtype=dq.dtype, device=q.device)
            for meeting in cut.meetings(self.rank, queries, (self.rank - step) % self.size):
                here = meeting.keys.here
                into = grads[0][here], grads[1][here]
                works[meeting.query].add(keys[0][here], keys[1][here], meeting.keys.span[0], meeting.pieces, grads=into)
            if travelling is not None:
                grads += travelling.wait()
            travelling = self._pass(grads, 1) if step < packing.hops else None
            if passing is not None:
                keys = passing.wait()
        if packing.hops:
            grads = self._pass(grads, -packing.hops).wait()
        return dq.to(q.dtype), grads[0].to(q.dtype), grads[1].to(q.dtype)

    def _pass(self, tensor: torch.Tensor, by: int) -> Passing:
        """To the rank so many places to the right, while as much comes in from the left."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        return Passing(tensor, self.group, self.traffic, to=to, source=source)

    def _cut_of(self, packing: SplitPacking, batch_size: int, window: int | None) -> RingCut:
        """One for all layers of a pass."""
        if self._cut is None or self._cut[0] is not packing:
            self._cut = packing, RingCut(packing, batch_size, window)
        return self._cut[1]


def _spec_of(chunk: Chunk, spec: AttentionSpec) -> AttentionSpec:
    """Of the queries of a chunk; its documents are in the pieces."""
    return replace(spec, first_query=chunk.span[0], packing=None)


def _of_lse(lse: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    rows, tokens = chunk.here
    return lse[rows, :, tokens]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
