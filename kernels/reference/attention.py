"""Causal attention by torch's own scaled_dot_product_attention: any device, any dtype, memory linear in the tokens.

Below it the same written out for one tile of queries and keys: any mask, softcap, with the LSE, and its exact backward.
"""

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


def tile_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(s) v and logsumexp(s) of one tile, s = q k^T * scale, or softcap * tanh(q k^T * scale / softcap).

    Scores of the whole tile exist at once. Key heads are not copied: the queries of a group stand one below the other.

    Args:
        q: (B, Hq, T, D). k, v: (B, Hkv, S, D), Hq a multiple of Hkv.
        mask: (T, S) bool, True where a query sees a key. A query that sees none gets out = 0 and LSE = -inf.

    Returns:
        out (B, Hq, T, D), lse (B, Hq, T): fp32, fp64 for fp64 input.
    """
    scores, _ = _scores(q, k, scale, mask, softcap)
    lse = scores.logsumexp(-1)
    probs = (scores - _finite(lse)[..., None]).exp()
    return (probs @ v.to(scores.dtype)).view(q.shape), lse.view(q.shape[:3])


def tile_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one tile, given the output and the LSE of the whole row, of which the tile may be a part.

        P = exp(s - lse),  D = rowsum(dout * out),  ds = P (dout v^T - D),  dv = P^T dout
        dq = scale * ds' k,  dk = scale * ds'^T q,  ds' = ds, with a softcap ds (1 - (s / softcap)^2)

    Args:
        dout, q, out: (B, Hq, T, D). k, v: (B, Hkv, S, D). lse: (B, Hq, T).

    Returns:
        dq (B, Hq, T, D), dk, dv (B, Hkv, S, D): fp32, fp64 for fp64 input.
    """
    scores, slope = _scores(q, k, scale, mask, softcap)
    wide = scores.dtype
    queries, cotangent, result = (_stacked(tensor, k.shape[1]).to(wide) for tensor in (q, dout, out))
    lse = lse.to(wide).reshape(scores.shape[:3])
    probs = (scores - _finite(lse)[..., None]).exp()
    delta = (cotangent * result).sum(-1, keepdim=True)
    d_scores = probs * (cotangent @ v.to(wide).mT - delta)
    if slope is not None:
        d_scores *= slope
    d_scores *= scale
    dq = (d_scores @ k.to(wide)).view(q.shape)
    return dq, d_scores.mT @ queries, probs.mT @ cotangent


def _stacked(tensor: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """(B, Hq, T, D) -> (B, Hkv, group * T, D): the queries that share a key head, one group member below the other."""
    batch_size, num_heads, num_queries, head_dim = tensor.shape
    return tensor.reshape(batch_size, num_key_heads, num_heads // num_key_heads * num_queries, head_dim)


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, mask: torch.Tensor | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, Hkv, group * T, S) masked scores, and the slope of the softcap where there is one."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = _stacked(q, k.shape[1]).to(wide) @ k.to(wide).mT * scale
    slope = None
    if softcap is not None:
        bent = (scores / softcap).tanh()
        scores, slope = bent * softcap, 1 - bent.square()
    if mask is not None:
        group = q.shape[1] // k.shape[1]
        scores = scores.masked_fill(~mask.repeat(group, 1), float("-inf"))
    return scores, slope


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Zero where nothing was seen: -inf - -inf would be NaN."""
    return torch.where(lse == float("-inf"), 0.0, lse)
