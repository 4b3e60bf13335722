"""Attention over one block of keys in plain torch: the operator for every dtype, mask and softcap."""

from __future__ import annotations

import torch

from headrace.kernels.attention.cut import TILE
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.merge import merge_
from headrace.kernels.reference.attention import causal_mask, tile_backward, tile_forward

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ReferenceBlocks:
    """Plain torch, TILE x TILE scores at a time; results are fp32, fp64 for fp64.

    Args:
        softcap: scores become softcap * tanh(score / softcap).
    """

    name = AttentionOperator.reference
    smallest_side = 1

    def __init__(self, softcap: float | None = None) -> None:
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap={softcap}: above 0, or None")
        self.softcap = softcap

    def check(self, q: torch.Tensor) -> None:
        if not q.dtype.is_floating_point:
            raise ValueError(f"attention operator reference: q is {q.dtype}: a floating dtype")

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the interface says; `mask` (T, S) bool, True where a query sees a key, in the place of `causal`."""
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
        for rows, columns, tile_mask in _tiles(q, k, causal, mask):
            merge_(
                *(out[:, :, rows], lse[:, :, rows]),
                *tile_forward(
                    *(q[:, :, rows], k[:, :, columns], v[:, :, columns]),
                    scale=scale,
                    mask=tile_mask,
                    softcap=self.softcap,
                ),
            )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        causal: bool,
        scale: float,
        mask: torch.Tensor | None = None,
    ) -> Gradients:
        """As the interface says; `mask` as in `forward`."""
        dq, dk, dv = (torch.zeros(tensor.shape, dtype=lse.dtype, device=q.device) for tensor in (q, k, v))
        for rows, columns, tile_mask in _tiles(q, k, causal, mask):
            part = tile_backward(
                *(dout[:, :, rows], q[:, :, rows], k[:, :, columns], v[:, :, columns]),
                *(out[:, :, rows], lse[:, :, rows]),
                scale=scale,
                mask=tile_mask,
                softcap=self.softcap,
            )
            dq[:, :, rows] += part[0]
            dk[:, :, columns] += part[1]
            dv[:, :, columns] += part[2]
        return dq, dk, dv


def _tiles(
    q: torch.Tensor, k: torch.Tensor, causal: bool, mask: torch.Tensor | None
) -> list[tuple[slice, slice, torch.Tensor | None]]:
    """Queries, keys and mask of every tile in which something is seen."""
    tiles: list[tuple[slice, slice, torch.Tensor | None]] = []
    for first in range(0, q.shape[2], TILE):
        rows = slice(first, min(first + TILE, q.shape[2]))
        for begin in range(0, k.shape[2], TILE):
            columns = slice(begin, min(begin + TILE, k.shape[2]))
            if mask is not None:
                tiles.append((rows, columns, mask[rows, columns]))
            elif not causal or begin < first:
                tiles.append((rows, columns, None))
            elif begin == first:
                side = rows.stop - first
                tiles.append((rows, columns, causal_mask(side, side, None, q.device)))
    return tiles
