"""Page means and scores in plain torch; `kernels/pages.py` has the equations and checks what comes here."""

from __future__ import annotations

import torch


def page_mean(k: torch.Tensor, page_size: int) -> torch.Tensor:
    """(B, T, Hkv, D) to (B, pages, Hkv, D); see kernels.pages.page_mean."""
    means = [page.mean(1, dtype=_wide(k)) for page in k.split(page_size, dim=1)]
    return torch.stack(means, dim=1)


def page_score(q: torch.Tensor, means: torch.Tensor, tile: int) -> torch.Tensor:
    """(B, T, Hq, D) and (B, P, Hkv, D) to (B, tiles, P), one tile at a time; see kernels.pages.page_score."""
    wide = _wide(q)
    keys = means.to(wide).permute(0, 2, 3, 1)
    scores = []
    for queries in q.split(tile, dim=1):
        summed = queries.unflatten(2, (means.shape[2], -1)).sum(3, dtype=wide)
        logits = summed.transpose(1, 2) @ keys
        scores.append(logits.softmax(-1).sum((1, 2)))
    return torch.stack(scores, dim=1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32
