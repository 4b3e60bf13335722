"""Page means and scores in Triton; `kernels/pages.py` has the equations and checks what comes here.

A score needs the softmax over all pages, whose number grows with the sweep: one kernel takes maximum and sum of every
query and KV head, page block by page block; a second one makes the weights again and sums them over heads and queries.
Every output is written by one program, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MEAN_TOKENS = 16
# Blocks of a product, the last one along D, slice by slice.
QUERIES, PAGES, SLICE = 32, 64, 16
NUM_WARPS = 4


def page_mean(k: torch.Tensor, page_size: int) -> torch.Tensor:
    """(B, T, Hkv, D) to (B, pages, Hkv, D); see kernels.pages.page_mean."""
    batch_size, num_tokens, num_heads, width = k.shape
    num_pages = triton.cdiv(num_tokens, page_size)
    means = torch.empty(batch_size, num_pages, num_heads, width, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        _page_mean[(num_pages, num_heads, batch_size)](
            k,
            means,
            num_tokens,
            page_size,
            width,
            *k.stride()[:3],
            *means.stride()[:3],
            STEPS=triton.cdiv(page_size, MEAN_TOKENS),
            TOKENS=MEAN_TOKENS,
            WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=NUM_WARPS,
        )
    return means


def page_score(q: torch.Tensor, means: torch.Tensor, tile: int) -> torch.Tensor:
    """(B, T, Hq, D) and (B, P, Hkv, D) to (B, tiles, P); see kernels.pages.page_score."""
    batch_size, num_queries, _, width = q.shape
    num_pages, num_kv_heads = means.shape[1:3]
    num_tiles = triton.cdiv(num_queries, tile)
    # A gth of q in elements, and read many times: the one intermediate that goes through memory.
    summed = q.unflatten(2, (num_kv_heads, -1)).sum(3, dtype=torch.float32)
    # Maximum and sum apart: logits are not scaled and may be thousands, where an LSE in fp32 adds an error of 1e-4.
    largest = torch.empty(batch_size, num_kv_heads, num_queries, dtype=torch.float32, device=q.device)
    sum_exp = torch.empty_like(largest)
    scores = torch.empty(batch_size, num_tiles, num_pages, dtype=torch.float32, device=q.device)
    sizes = (num_queries, num_pages, num_kv_heads, width, *means.stride()[:3])
    blocks = {"QUERIES": QUERIES, "PAGES": PAGES, "WIDTH": SLICE, "SLICES": triton.cdiv(width, SLICE)}
    with torch.cuda.device_of(q):
        grid = (triton.cdiv(num_queries, QUERIES), num_kv_heads, batch_size)
        _page_softmax[grid](summed, means, largest, sum_exp, *sizes, **blocks, num_warps=NUM_WARPS)
        grid = (triton.cdiv(num_pages, PAGES), num_tiles, batch_size)
        steps = triton.cdiv(tile, QUERIES)
        _page_score[grid](
            summed, means, largest, sum_exp, scores, *sizes, tile, STEPS=steps, **blocks, num_warps=NUM_WARPS
        )
    return scores


@triton.jit
def _page_mean(
    k,
    means,
    num_tokens,
    page_size,
    width,
    k_batch,
    k_token,
    k_head,
    mean_batch,
    mean_page,
    mean_head,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    page, head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    first = page * page_size
    end = tl.minimum(first + page_size, num_tokens)
    k += batch * k_batch + head * k_head
    # Lane by lane, one reduction at the end.
    total = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for step in range(STEPS):
        tokens = first + step * TOKENS + tl.arange(0, TOKENS)
        there = (tokens < end)[:, None] & (columns < width)[None, :]
        total += tl.load(k + tokens[:, None] * k_token + columns[None, :], mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / (end - first).to(tl.float32)
    tl.store(means + batch * mean_batch + page * mean_page + head * mean_head + columns, mean, mask=columns < width)


@triton.jit
def _logits(
    summed,
    means,
    batch,
    head,
    queries,
    there,
    pages,
    num_queries,
    num_pages,
    num_kv_heads,
    width,
    mean_batch,
    mean_page,
    mean_head,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Products of summed queries and page means, fp32 (queries, pages), -inf beyond the last page; all places int64.

    Along D slice by slice: whole rows in registers would not leave room for the products.
    """
    inside = pages < num_pages
    rows = (batch * num_queries + queries) * num_kv_heads + head
    keys = means + batch * mean_batch + head * mean_head + pages * mean_page
    logits = tl.zeros((rows.shape[0], keys.shape[0]), dtype=tl.float32)
    for part in range(SLICES):
        columns = part * WIDTH + tl.arange(0, WIDTH)
        valid = columns < width
        query = tl.load(
            summed + rows[:, None] * width + columns[None, :], mask=there[:, None] & valid[None, :], other=0.0
        )
        key = tl.load(keys[None, :] + columns[:, None], mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
        # Products of tf32 would choose other pages than the reference does.
        logits = tl.dot(query, key, logits, input_precision="ieee")
    return tl.where(inside[None, :], logits, -float("inf"))


@triton.jit
def _page_softmax(
    summed,
    means,
    largest,
    sum_exp,
    num_queries,
    num_pages,
    num_kv_heads,
    width,
    mean_batch,
    mean_page,
    mean_head,
    QUERIES: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    queries = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    there = queries < num_queries
    top = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    begin = batch * 0
    while begin < num_pages:
        logits = _logits(
            summed,
            means,
            batch,
            head,
            queries,
            there,
            begin + tl.arange(0, PAGES),
            num_queries,
            num_pages,
            num_kv_heads,
            width,
            mean_batch,
            mean_page,
            mean_head,
            WIDTH,
            SLICES,
        )
        # Every block has a page, so its maximum is finite for finite keys.
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        begin += PAGES
    row = (batch * num_kv_heads + head) * num_queries
    tl.store(largest + row + queries, top, mask=there)
    tl.store(sum_exp + row + queries, total, mask=there)


@triton.jit
def _page_score(
    summed,
    means,
    largest,
    sum_exp,
    scores,
    num_queries,
    num_pages,
    num_kv_heads,
    width,
    mean_batch,
    mean_page,
    mean_head,
    tile,
    STEPS: tl.constexpr,
    QUERIES: tl.constexpr,
    PAGES: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    place, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pages = tl.program_id(0).to(tl.int64) * PAGES + tl.arange(0, PAGES)
    first = place * tile
    end = tl.minimum(first + tile, num_queries)
    total = tl.zeros((PAGES,), dtype=tl.float32)
    head = batch * 0
    while head < num_kv_heads:
        row = (batch * num_kv_heads + head) * num_queries
        for step in range(STEPS):
            queries = first + step * QUERIES + tl.arange(0, QUERIES)
            there = queries < end
            logits = _logits(
                summed,
                means,
                batch,
                head,
                queries,
                there,
                pages,
                num_queries,
                num_pages,
                num_kv_heads,
                width,
                mean_batch,
                mean_page,
                mean_head,
                WIDTH,
                SLICES,
            )
            # A maximum of inf makes the weights of queries that are not there 0.
            top = tl.load(largest + row + queries, mask=there, other=float("inf"))
            share = 1.0 / tl.load(sum_exp + row + queries, mask=there, other=1.0)
            total += tl.sum(tl.exp(logits - top[:, None]) * share[:, None], 0)
        head += 1
    row = (batch * tl.num_programs(1) + place) * num_pages
    tl.store(scores + row + pages, total, mask=pages < num_pages)
