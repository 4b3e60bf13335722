"""Staging blocks in plain torch: one copy per tensor. `kernels/pack.py` checks what comes here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from headrace.kernels.pack_layout import PackLayout, Piece


def pack(tensors: Mapping[str, torch.Tensor], layout: PackLayout, begin: int, out: torch.Tensor) -> None:
    """Fill `out` with tokens [begin, begin + layout.num_tokens) of the tensors; see kernels.pack.pack."""
    for piece, region, gap in _regions(out, layout):
        region.copy_(tensors[piece.name].narrow(piece.token_dim, begin, layout.num_tokens))
        gap.zero_()


def unpack(block: torch.Tensor, layout: PackLayout, begin: int, out: Mapping[str, torch.Tensor]) -> None:
    """Write the pieces of `block` into tokens [begin, begin + layout.num_tokens) of `out`; see kernels.pack.unpack."""
    for piece, region, _ in _regions(block, layout):
        out[piece.name].narrow(piece.token_dim, begin, layout.num_tokens).copy_(region)


def _regions(block: torch.Tensor, layout: PackLayout) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
    """Every piece, its region of the block as a tensor, and the bytes between it and the next."""
    ends = (*layout.offsets_bytes[1:], layout.total_bytes)
    for piece, offset, size, end in zip(layout.pieces, layout.offsets_bytes, layout.piece_bytes, ends, strict=True):
        region = block[offset : offset + size].view(getattr(torch, piece.staged))
        yield piece, region.view(piece.shape_of(layout.num_tokens)), block[offset + size : end]
