"""What a caller hands to the stack: which tensors can be stored, and as what."""

from __future__ import annotations

import torch

from headrace.storage.core.errors import InputError
from headrace.storage.core.keys import BlockKey


def storable(key: BlockKey, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor as dense, contiguous memory without gradient; itself where it is that already.

    Raises:
        InputError: a sparse or quantised tensor, or one on another device than the tiers serve.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise InputError(f"block {key}: a tensor of layout {tensor.layout} cannot be stored; make it dense first")
    if tensor.device != device:
        raise InputError(f"block {key} is on {tensor.device}, the tiers serve {device}")
    dense = tensor.detach()
    if dense.dtype.is_complex:
        dense = dense.resolve_conj()
    dense = dense.resolve_neg().contiguous()
    # An inference tensor has no version counter to watch.
    return dense.clone() if dense.is_inference() else dense
