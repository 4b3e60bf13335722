"""What a blob holds: one tensor, by its shape and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch

from headrace.storage.core.errors import InputError
from headrace.storage.core.keys import BlobKey


class Form(NamedTuple):
    """Shape and dtype of a blob's tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Exact."""
        return self.shape.numel() * self.dtype.itemsize

    def check_buffer(self, key: BlobKey, buffer: torch.Tensor, device: torch.device) -> None:
        """Raises ValueError if the blob does not fit into the buffer exactly."""
        if (buffer.shape, buffer.dtype, buffer.device) == (*self, device) and buffer.is_contiguous():
            return
        raise ValueError(
            f"blob {key}: a load needs a contiguous buffer, {tuple(self.shape)} {self.dtype} on {device} "
            f"({self.num_bytes} bytes); given is {'a contiguous' if buffer.is_contiguous() else 'a strided'} one, "
            f"{tuple(buffer.shape)} {buffer.dtype} on {buffer.device} ({buffer.nbytes} bytes)"
        )


def storable(key: BlobKey, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor as dense, contiguous memory without gradient; itself where it is that already.

    Raises:
        InputError: a sparse or quantised tensor, or one on another device than the tiers serve.
    """
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
