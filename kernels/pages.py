"""Page means and page scores: which pages of the past a tile of queries attends to (OOMB's page-sparse attention)."""

from __future__ import annotations

import torch

from headrace.kernels.backend import Backend
from headrace.kernels.dispatch import choose
from headrace.kernels.reference import pages as reference


@torch.no_grad()
def page_mean(k: torch.Tensor, page_size: int, *, backend: Backend = Backend.auto) -> torch.Tensor:
    """kbar_p = mean over the tokens of page p of the keys after RoPE, per KV head. The last page may be ragged.

    Args:
        k: (B, T, Hkv, D), the last dimension contiguous. Page p has tokens [p page_size, (p + 1) page_size).

    Returns:
        (B, ceil(T / page_size), Hkv, D), fp32 (fp64 for fp64), summed in it.

    Raises:
        ValueError: another shape, no token, a page size below 1, or a backend that cannot (see dispatch.choose).
    """
    if k.dim() != 4 or 0 in k.shape or not k.is_floating_point() or k.stride(-1) != 1:
        raise ValueError(f"k: {_say(k)}, strides {k.stride()}; floats (B, T, Hkv, D), D contiguous, expected")
    if page_size < 1:
        raise ValueError(f"page_size={page_size}: at least 1 token")
    if choose("page_mean", backend, k.device, k.dtype).got is Backend.triton:
        from headrace.kernels.fused import pages as fused

        return fused.page_mean(k, page_size)
    return reference.page_mean(k, page_size)


@torch.no_grad()
def page_score(q: torch.Tensor, means: torch.Tensor, tile: int, *, backend: Backend = Backend.auto) -> torch.Tensor:
    """The score of each earlier page for the tiles of queries.

        w[h, t, p] = softmax over p of (sum of the query heads of KV head h at t) . kbar_p[h]
        score[i, p] = sum over h and over the queries t of tile i of w[h, t, p]

    No 1 / sqrt(D), and no gradient: the choice of pages is a constant. A row of scores sums to Hkv x queries.

    Args:
        q: (B, T, Hq, D), after RoPE, the last dimension contiguous; query head h belongs to KV head h // (Hq / Hkv).
        means: (B, P, Hkv, D), of pages that lie before all of these queries; see page_mean.
        tile: queries of a tile; the last one may be ragged.

    Returns:
        (B, ceil(T / tile), P), fp32 (fp64 for fp64), computed in it.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no page, no query, a tile below 1, or a backend that
            cannot (see dispatch.choose).
    """
    said = f"q {_say(q)}, means {_say(means)}"
    if q.dim() != 4 or means.dim() != 4 or 0 in q.shape or 0 in means.shape:
        raise ValueError(f"{said}: (B, T, Hq, D) and (B, P, Hkv, D) expected, neither empty")
    if q.shape[0] != means.shape[0] or q.shape[3] != means.shape[3] or q.shape[2] % means.shape[2]:
        raise ValueError(f"{said} do not fit: the same B and D, Hq a multiple of Hkv")
    if not q.is_floating_point() or not means.is_floating_point() or q.device != means.device:
        raise ValueError(f"{said}: floats on one device expected")
    if q.stride(-1) != 1 or means.stride(-1) != 1:
        raise ValueError(f"{said}, strides {q.stride()} and {means.stride()}: the last dimension must be contiguous")
    if tile < 1:
        raise ValueError(f"tile={tile}: at least 1 query")
    if choose("page_score", backend, q.device, q.dtype).got is Backend.triton:
        from headrace.kernels.fused import pages as fused

        return fused.page_score(q, means, tile)
    return reference.page_score(q, means, tile)


@torch.no_grad()
def top_pages(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """The `budget` pages of highest score; of pages with equal scores the lower one.

    Args:
        scores: (..., P) as page_score gives them.
        budget: pages to take, at least 1; all where there are no more than that.

    Returns:
        (..., min(budget, P)) int64, in ascending order of pages: the order in which attention visits them.

    Raises:
        ValueError: a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"budget={budget}: at least 1 page")
    # torch.topk does not say which of two equal scores it takes; a stable sort does.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :budget].sort(dim=-1).values


def _say(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
