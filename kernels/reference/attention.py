"""Attention of one tile of queries and keys, written out: any mask, softcap, with the LSE, and its exact backward."""

from __future__ import annotations

import torch


def causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """(num_queries, num_keys) bool, True where a query sees a key; the queries are the last of the keys' tokens."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (queries - keys < window)


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
