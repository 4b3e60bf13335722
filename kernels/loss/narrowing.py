"""What becomes of the sums of matrix products."""

from __future__ import annotations

import torch

# Of the pieces in which a sum is narrowed.
NARROW_BYTES = 16 * 2**20


def scaled_(total: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total * factor, taken in the dtype of `total` and rounded to `dtype` in the memory of `total`.

    A fresh tensor of the narrow dtype beside the sum would make half as much again. The result keeps the sum's storage,
    twice its own size for bf16, until it is freed.

    Args:
        total: contiguous, with a storage of its own; undefined afterwards. dtype: not wider than its own.
    """
    total.mul_(factor)
    if total.dtype is dtype or total.numel() == 0:
        return total.to(dtype)
    narrow = torch.empty(0, dtype=dtype, device=total.device).set_(
        total.untyped_storage(), 0, total.shape, total.stride()
    )
    rows_per_piece = max(1, NARROW_BYTES // (total[0].numel() * total.element_size()))
    # Front to back: what is written lies before everything that is still to be read.
    for wide_rows, narrow_rows in zip(total.split(rows_per_piece), narrow.split(rows_per_piece), strict=True):
        narrow_rows.copy_(wide_rows.to(dtype))
    return narrow
