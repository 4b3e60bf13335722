"""Causal attention by torch's own scaled_dot_product_attention: any device, any dtype, memory linear in the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Queries that share one mask where the mask is not the plain causal one.
QUERY_TILE = 512


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v. The queries are the last T of the S tokens; each sees itself and what is before.

    Args:
        q: (B, T, Hq, D). k, v: (B, S, Hkv, D), S >= T, Hq a multiple of Hkv.
        window: tokens a query sees, itself included; None means all before it.

    Returns:
        (B, T, Hq, D).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if q.is_cuda and q.shape[1] != k.shape[1]:
        # The fp32 kernel of CUDA that needs no T x S matrix wants as many key heads as query heads.
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if window is not None and window >= num_keys:
        window = None
    if num_queries == num_keys and window is None:
        out = _sdpa(q, k, v, None, scale, is_causal=num_queries > 1)
    elif num_queries == 1 and window is None:
        out = _sdpa(q, k, v, None, scale)
    elif num_queries == num_keys and window is not None:
        out = _banded(q, k, v, scale, window)
    else:
        out = _last_queries(q, k, v, scale, window)
    return out.transpose(1, 2)


def _banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """T = S with a window: every tile of queries sees its own tile of keys and the one before it."""
    tile = max(window, QUERY_TILE)
    # split, not slices: the backward of a split is one concatenation, that of a slice a tensor full of zeros.
    queries, keys, values = (tensor.split(tile, dim=2) for tensor in (q, k, v))
    outs = []
    for i, part in enumerate(queries):
        near_k, near_v = keys[i], values[i]
        if i > 0:
            near_k, near_v = torch.cat((keys[i - 1], near_k), dim=2), torch.cat((values[i - 1], near_v), dim=2)
        mask = causal_mask(part.shape[2], near_k.shape[2], window, q.device)
        outs.append(_sdpa(part, near_k, near_v, mask, scale))
    return torch.cat(outs, dim=2)


def _last_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """Fewer queries than keys: tile by tile, each against the keys that its queries can see."""
    num_before = k.shape[2] - q.shape[2]
    outs, begin = [], 0
    for part in q.split(QUERY_TILE, dim=2):
        end = num_before + begin + part.shape[2]
        first = 0 if window is None else max(0, num_before + begin + 1 - window)
        mask = causal_mask(part.shape[2], end - first, window, q.device)
        outs.append(_sdpa(part, k[:, :, first:end], v[:, :, first:end], mask, scale))
        begin += part.shape[2]
    return torch.cat(outs, dim=2)


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(num_queries, num_keys) bool, True where a query sees a key; the queries are the last of the keys' tokens."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    *,
    is_causal: bool = False,
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
