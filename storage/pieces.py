"""What a blob holds: one tensor, or several pieces (a codec's payload) in one slot under one checksum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headrace.storage.core.errors import InputError
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.ledger import PIECE_BYTES, round_up
from headrace.storage.tier import as_bytes
from headrace.storage.transfer import DeviceCopies

Source = torch.Tensor | Sequence[torch.Tensor]


class Piece(NamedTuple):
    """One tensor of a blob, and its first byte in it."""

    shape: torch.Size
    dtype: torch.dtype
    begin: int

    @property
    def num_bytes(self) -> int:
        """Exact."""
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Dtype, shape and place of every piece. A blob of one piece is loaded as its tensor, others as flat bytes."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that holds the whole blob."""
        if len(self.pieces) == 1:
            return self.pieces[0].shape
        return torch.Size((self.pieces[-1].begin + self.pieces[-1].num_bytes,))

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that holds the whole blob."""
        return self.pieces[0].dtype if len(self.pieces) == 1 else torch.uint8

    def views(self, whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pieces, as views of the tensor that holds the whole blob."""
        if len(self.pieces) == 1:
            return (whole,)
        parts = (whole[piece.begin : piece.begin + piece.num_bytes] for piece in self.pieces)
        return tuple(part.view(p.dtype).view(p.shape) for part, p in zip(parts, self.pieces, strict=True))

    def check_buffer(self, key: BlobKey, buffer: torch.Tensor, device: torch.device) -> None:
        """Raises ValueError if the blob does not fit into the buffer exactly."""
        if (buffer.shape, buffer.dtype, buffer.device) == (self.shape, self.dtype, device) and buffer.is_contiguous():
            return
        raise ValueError(
            f"blob {key}: a load needs a contiguous buffer, {tuple(self.shape)} {self.dtype} on {device} "
            f"({self.shape.numel() * self.dtype.itemsize} bytes); given is "
            f"{'a contiguous' if buffer.is_contiguous() else 'a strided'} one, {tuple(buffer.shape)} {buffer.dtype} on "
            f"{buffer.device} ({buffer.nbytes} bytes)"
        )


def layout_of(forms: Iterable[tuple[torch.Size, torch.dtype]]) -> Layout:
    """Pieces of these shapes and dtypes, one behind the other."""
    end, pieces = 0, []
    for shape, dtype in forms:
        pieces.append(Piece(shape, dtype, round_up(end, PIECE_BYTES)))
        end = pieces[-1].begin + pieces[-1].num_bytes
    return Layout(tuple(pieces))


def laid_out(key: BlobKey, source: Source, copies: DeviceCopies) -> tuple[torch.Tensor, Layout]:
    """The tensor that holds the whole blob, and its layout; several pieces are copied together on the caller's stream.

    Raises:
        InputError: no piece, a sparse or quantised tensor, or one on another device than the tiers serve.
    """
    if isinstance(source, torch.Tensor):
        whole = _storable(key, source, copies.device)
        return whole, Layout((Piece(whole.shape, whole.dtype, 0),))
    dense = [_storable(key, tensor, copies.device) for tensor in source]
    if not dense:
        raise InputError(f"blob {key} has no piece; give at least one tensor")
    layout = layout_of((tensor.shape, tensor.dtype) for tensor in dense)
    if len(dense) == 1:
        return dense[0], layout
    whole = copies.target(layout.shape, layout.dtype)
    for tensor, piece in zip(dense, layout.pieces, strict=True):
        copies.copy(whole[piece.begin : piece.begin + piece.num_bytes], as_bytes(tensor))
    return whole, layout


def _storable(key: BlobKey, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor as dense, contiguous memory without gradient; itself where it is that already."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise InputError(f"blob {key}: a tensor of layout {tensor.layout} cannot be stored; make it dense first")
    if tensor.device != device:
        raise InputError(f"blob {key} is on {tensor.device}, the tiers serve {device}")
    dense = tensor.detach()
    if dense.dtype.is_complex:
        dense = dense.resolve_conj()
    dense = dense.resolve_neg().contiguous()
    # An inference tensor has no version counter to watch.
    return dense.clone() if dense.is_inference() else dense
