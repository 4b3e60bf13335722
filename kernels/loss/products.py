"""Matrix products that sum in a wider dtype, in place, and what becomes of their sums."""

from __future__ import annotations

import torch

# Of the pieces in which a sum is narrowed.
NARROW_BYTES = 16 * 2**20


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b, summed and returned in `dtype`."""
    if a.dtype is dtype:
        return a @ b
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in the dtype of `total`; on CUDA with no second buffer of its size."""
    if a.numel() == 0 or b.numel() == 0:
        return
    if not total.is_cuda:
        total += product(a, b, total.dtype)
    elif total.dtype is a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


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
