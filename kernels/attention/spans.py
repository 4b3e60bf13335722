"""Attention of queries to which keys come in spans, from anywhere in the row: the parts of a ring (arXiv 2310.01889).

`block_pieces` says which pieces of scores a span of keys makes with a span of queries, in places of the row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from headrace.kernels.attention.blocks import PieceWork
from headrace.kernels.attention.cut import Piece
from headrace.kernels.attention.spec import AttentionSpec
from headrace.kernels.merge import merge_


class SpanAttention:
    """Forward of one span of queries.

    Args:
        q: (B, T, Hq, D). spec: with `first_query`; its documents are in the pieces already.
        out: (B, T, Hq, D) fp32 (fp64 for fp64), zeros. lse: (B, Hq, T) fp64, -inf. The results so far; views.
    """

    def __init__(self, q: torch.Tensor, spec: AttentionSpec, out: torch.Tensor, lse: torch.Tensor) -> None:
        self._work, self._out, self._lse = PieceWork(q, spec), out.transpose(1, 2), lse

    def add(self, k: torch.Tensor, v: torch.Tensor, first_key: int, pieces: Iterable[Piece]) -> None:
        """Take in keys and values (B, S, Hkv, D) that begin at `first_key` of the row."""
        for piece in pieces:
            out, lse = (self._work.grouped(total, piece, k.shape[2]) for total in (self._out, self._lse))
            merge_(out, lse, *self._work.forward(piece, k, v, first_key))


class SpanGradient:
    """Backward of one span of queries.

    Args:
        dout, q, out: (B, T, Hq, D). lse: (B, Hq, T). Final ones, of the whole row.
        dq: (B, T, Hq, D), fp32 (fp64 for fp64), zeros; a view. What comes is added.
    """

    def __init__(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        spec: AttentionSpec,
        dq: torch.Tensor,
    ) -> None:
        self._work, self._dq = PieceWork(q, spec, dout=dout, out=out, lse=lse), dq.transpose(1, 2)

    def add(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        first_key: int,
        pieces: Iterable[Piece],
        *,
        grads: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Add the gradients of keys and values (B, S, Hkv, D) that begin at `first_key` to `grads`, like them."""
        for piece in pieces:
            found = self._work.backward(piece, k, v, first_key)
            self._work.grouped(self._dq, piece, k.shape[2]).add_(found[0])
            keys = slice(*(place - first_key for place in piece.keys))
            for total, part in zip(grads, found[1:], strict=True):
                total[slice(*piece.rows), keys].transpose(1, 2).add_(part)
