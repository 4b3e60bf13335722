"""Matrix products that sum in a wider dtype, in place."""

from __future__ import annotations

import torch


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
    """total += a @ b in the dtype of `total`; a second buffer of its size is needed only on CPU for unequal dtypes."""
    if a.numel() == 0 or b.numel() == 0:
        return
    if total.dtype is a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product(a, b, total.dtype)
