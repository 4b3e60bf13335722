"""Streaming attention against softmax written out in fp64: cuts, documents, windows, softcap, sources, mutants."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.attention import (
    AttentionSpec,
    ResidentBlocks,
    attention,
    attention_backward,
    attention_backward_blocks,
    attention_forward,
    attention_forward_blocks,
    block_bounds,
    blocks,
    cut,
    reference_blocks,
    spec,
    spec_for,
)
from headrace.kernels.attention.operators import FlashBlocks
from headrace.kernels.backend import AttentionOperator
from headrace.kernels.packing import Packing
from headrace.kernels.reference.attention import tile_backward, tile_forward

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ON_CPU = [AttentionOperator.flash, AttentionOperator.reference]
SCALE = 0.3


def by_hand(q, k, v, *, packing=None, window=None, softcap=None) -> torch.Tensor:
    """softmax(q k^T) v in the dtype of q, with the mask by definition."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    seen = seen_by_hand(q.shape[0], num_keys, packing, window)[:, num_keys - num_queries :]
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1), v)


def qkv(draw, num_queries=13, num_keys=13, heads=(4, 2), dtype=torch.float64, rows=2) -> list[torch.Tensor]:
    shapes = ((num_queries, heads[0]), (num_keys, heads[1]), (num_keys, heads[1]))
    return [draw(rows, *shape, 8, dtype=dtype) for shape in shapes]


def with_gradients(call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = call(*leaves)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(inputs[0].dtype).to(out.dtype))]


def worst_error(call, inputs, **masks) -> float:
    exact = with_gradients(lambda q, k, v: by_hand(q, k, v, **masks), [tensor.double() for tensor in inputs])
    return max(rel_error(a, b) for a, b in zip(with_gradients(call, inputs), exact, strict=True))


# name: (queries, keys), keys of a block, packing, window
CASES = {
    "blocks and a ragged last one": ((13, 13), 4, None, None),
    "one block": ((13, 13), 13, None, None),
    "a block longer than the keys": ((13, 13), 20, None, None),
    "blocks of one key": ((5, 5), 1, None, None),
    "one token": ((1, 1), 4, None, None),
    "one query over a prefix": ((1, 13), 4, None, None),
    "a chunk that starts with a block": ((5, 13), 4, None, None),
    "a chunk that starts within a block": ((6, 13), 4, None, None),
    "packed": ((13, 13), 4, (5, 8, 1, 12), None),
    "packed, chunk over a prefix": ((6, 13), 4, (5, 8, 1, 12), None),
    "one document a row": ((13, 13), 4, (13, 13), None),
    "window below a block": ((13, 13), 6, None, 2),
    "window of a block": ((13, 13), 4, None, 4),
    "window above a block": ((13, 13), 4, None, 7),
    "window above the keys": ((13, 13), 4, None, 50),
    "window, chunk over a prefix": ((5, 13), 4, None, 6),
    "packed with a window": ((13, 13), 4, (9, 4, 13), 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ON_CPU)
@pytest.mark.parametrize("case", CASES)
def test_against_softmax_by_hand(draw, monkeypatch, case: str, operator, dtype) -> None:
    for module in (cut, reference_blocks):
        monkeypatch.setattr(module, "TILE", 3)  # so that a tile is below a window and below a block
    (num_queries, num_keys), block_len, lengths, window = CASES[case]
    packing = None if lengths is None else Packing.of_lengths(lengths)
    inputs = qkv(draw, num_queries, num_keys, dtype=dtype)
    masks = {"packing": packing, "window": window}

    def call(q, k, v):
        return attention(q, k, v, scale=SCALE, block_len=block_len, operator=operator, **masks)

    assert worst_error(call, inputs, **masks) <= REL_ERROR["attention"][dtype]
    if dtype is torch.float64:
        assert worst_error(call, inputs, **masks) <= 2e-15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (4, 1), (8, 2), (8, 1)])
@pytest.mark.parametrize("operator", ON_CPU)
def test_grouped_queries(draw, heads: tuple[int, int], operator, dtype) -> None:
    inputs = qkv(draw, 9, 13, heads, dtype)
    error = worst_error(lambda *x: attention(*x, scale=SCALE, block_len=4, operator=operator), inputs)
    assert error <= REL_ERROR["attention"][dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap(draw, softcap: float, dtype) -> None:
    q, k, v = qkv(draw, 9, 13, dtype=dtype)
    inputs = [4 * q, k, v]  # scores of several softcaps of 2
    for call in (
        lambda *x: attention(*x, scale=SCALE, block_len=4, window=6, softcap=softcap),
        lambda *x: attention(*x, scale=SCALE, window=6, softcap=softcap),
    ):
        assert worst_error(call, inputs, window=6, softcap=softcap) <= REL_ERROR["attention"][dtype]
    uncapped = worst_error(lambda *x: attention(*x, scale=SCALE, block_len=4), inputs, softcap=softcap)
    assert uncapped > 1e-2


@pytest.mark.parametrize("operator", ON_CPU)
def test_gradcheck(draw, operator) -> None:
    softcap = {"softcap": 2.0} if operator is AttentionOperator.reference else {}
    for options in (softcap, {"window": 2}, {"packing": Packing.of_lengths((1, 3))}):
        inputs = [draw(1, tokens, heads, 2).requires_grad_() for tokens, heads in ((3, 2), (4, 1), (4, 1))]
        assert torch.autograd.gradcheck(
            lambda *x, o=options: attention(*x, scale=SCALE, block_len=2, operator=operator, **o), inputs
        )


def test_tile_with_any_mask(draw) -> None:
    """A mask without any order, a query that sees nothing; the backward of one of two tiles that make up a row."""
    q, k, v = (draw(2, heads, length, 8).requires_grad_() for heads, length in ((4, 5), (2, 7), (2, 7)))
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0], mask[2] = True, False
    out, lse = tile_forward(q, k, v, scale=SCALE, mask=mask, softcap=1.5)
    assert torch.equal(out[:, :, 2], torch.zeros(2, 4, 8, dtype=torch.float64))
    assert (lse[:, :, 2] == float("-inf")).all()
    cotangent = draw(2, 4, 5, 8)
    exact = torch.autograd.grad(out[:, :, [0, 1, 3, 4]], (q, k, v), cotangent[:, :, [0, 1, 3, 4]])
    parts = []
    for keys in (slice(0, 3), slice(3, 7)):
        tile = (k[:, :, keys].detach(), v[:, :, keys].detach())
        options = {"scale": SCALE, "mask": mask[:, keys], "softcap": 1.5}
        parts.append(tile_backward(cotangent, q.detach(), *tile, out.detach(), lse.detach(), **options))
    assert rel_error(parts[0][0] + parts[1][0], exact[0]) <= 1e-14
    for i in (1, 2):
        assert rel_error(torch.cat((parts[0][i], parts[1][i]), dim=2), exact[i]) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_block_is_bit_equal_to_attention_on_the_whole(draw, dtype) -> None:
    """And many blocks are as near to it as the table says."""
    inputs = qkv(draw, 600, 600, (2, 1), dtype, rows=1)
    whole = with_gradients(lambda *x: attention(*x, scale=SCALE), inputs)
    once = with_gradients(lambda *x: attention(*x, scale=SCALE, block_len=600), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, whole, strict=True))
    cut_up = with_gradients(lambda *x: attention(*x, scale=SCALE, block_len=128), inputs)
    assert max(rel_error(a, b) for a, b in zip(cut_up, whole, strict=True)) <= REL_ERROR["attention"][dtype]


class FarBlocks:
    """Blocks kept one by one elsewhere, copied into one of two buffers when asked for."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, bounds) -> None:
        self.far = [(k[:, begin:end].clone(), v[:, begin:end].clone()) for begin, end in bounds]
        self.orders: list[tuple[int, ...]] = []

    def fetch(self, order):
        self.orders.append(tuple(order))
        buffers = [[torch.empty_like(tensor) for tensor in self.far[0]] for _ in range(2)]
        for turn, index in enumerate(order):
            buffer = [near[:, : far.shape[1]] for near, far in zip(buffers[turn % 2], self.far[index], strict=True)]
            for near, far in zip(buffer, self.far[index], strict=True):
                near.copy_(far)
            yield tuple(buffer)
            buffers[(turn + 1) % 2][0].fill_(float("nan"))  # the block before is not read any more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_where_blocks_live_changes_no_bit(draw, dtype, packed: bool) -> None:
    q, k, v = qkv(draw, 300, 600, (4, 2), dtype)
    dout, bounds = draw(*q.shape, dtype=dtype), block_bounds(600, 128)
    packing = Packing.of_lengths((280, 320, 600)) if packed else None
    spec = AttentionSpec(SCALE, 600, AttentionOperator.flash, block_len=128, packing=packing, window=400)
    far = FarBlocks(k, v, bounds)
    results = []
    for source in (ResidentBlocks(k, v, bounds), far):
        grads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        out, lse = attention_forward_blocks(q, source, spec)
        dq = attention_backward_blocks(
            *(dout, q, out, lse, source), lambda index, dk, dv, into=grads: into.__setitem__(index, (dk, dv)), spec
        )
        assert all(grad.dtype is torch.float32 for pair in grads.values() for grad in pair)
        results.append([out, lse, dq, *(grad for index in sorted(grads) for grad in grads[index])])
        assert list(grads) == list(far.orders[-1] if far.orders else sorted(grads, reverse=True))
    assert far.orders == [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_blocks_that_no_query_sees_are_neither_fetched_nor_given_a_gradient(draw) -> None:
    q, k, v = qkv(draw, 4, 16)
    bounds = block_bounds(16, 4)
    source, spec = FarBlocks(k, v, bounds), AttentionSpec(SCALE, 16, AttentionOperator.flash, block_len=4, window=3)
    out, lse = attention_forward_blocks(q, source, spec)
    told: list[int] = []
    attention_backward_blocks(out, q, out, lse, source, lambda index, dk, dv: told.append(index), spec)
    assert source.orders == [(2, 3), (3, 2)]
    assert told == [3, 2]


class BlockLocalLse(FlashBlocks):
    """Mutant: backward with the LSE and the output of the block alone."""

    def backward(self, dout, q, k, v, out, lse, *, causal, scale):
        out, lse = self.forward(q, k, v, causal=causal, scale=scale)
        return super().backward(dout, q, k, v, out, lse, causal=causal, scale=scale)


def test_mutants_are_seen(draw, monkeypatch) -> None:
    """A local LSE in backward, a merge left out, a diagonal counted twice or seen whole: all far outside."""
    inputs = qkv(draw)

    def error(**options) -> float:
        return worst_error(lambda *x: attention(*x, scale=SCALE, block_len=4, **options), inputs)

    merge_, pieces = blocks.merge_, spec.block_pieces
    assert error() <= 2e-15
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "block_operator", lambda *_: BlockLocalLse())
        assert error() > 1e-2
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "merge_", lambda *parts: (calls.append(0), len(calls) == 3 or merge_(*parts)))
        assert error() > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(
            spec,
            "block_pieces",
            lambda *x, **y: tuple(
                again for p in pieces(*x, **y) for again in ((p, p) if p.kind is cut.PieceKind.causal else (p,))
            ),
        )
        assert error() > 1e-2
    for wrong in ({"window": 12}, {"packing": Packing.of_lengths((12, 1, 13))}):
        assert error(**wrong) > 1e-3


def largest_allocation(call) -> int:
    """Bytes of the largest single allocation on the CPU, inside of operators as well."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    return max(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (AttentionOperator.flash, {}),
        (AttentionOperator.flash, {"window": 300}),
        (AttentionOperator.reference, {"softcap": 5.0}),
    ],
)
def test_memory_is_linear_in_tokens_and_key_heads_are_not_copied(draw, operator, options, monkeypatch) -> None:
    """Forward and backward make nothing of T x S, nothing of a block's keys with all query heads, a bounded tile."""
    for module in (cut, reference_blocks):
        monkeypatch.setattr(module, "TILE", 256)
    num_queries, num_keys, heads, block_len = 128, 2048, 8, 1024
    shapes = ((num_queries, heads), (num_keys, 1), (num_keys, 1))
    inputs = [draw(1, *shape, 64, dtype=torch.float32).requires_grad_() for shape in shapes]

    def both_ways() -> None:
        masks = {"block_len": block_len, "operator": operator, **options}
        attention(*inputs, scale=SCALE, **masks).sum().backward()

    largest = largest_allocation(both_ways)
    assert largest >= inputs[1].numel() * 4  # dk is seen
    assert largest < block_len * heads * 64 * 4
    assert largest < num_queries * num_keys * heads * 4


def test_copied_key_heads_would_be_seen(draw) -> None:
    k = draw(1, 512, 1, 8, dtype=torch.float32)
    assert largest_allocation(lambda: k.repeat_interleave(8, dim=2)) >= 512 * 8 * 8 * 4


def test_backward_twice(draw) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv(draw))
    out = attention(q, k, v, scale=SCALE, block_len=4).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


# name: packing, window, block_len, first query and number of queries (None: all)
SHARED = Packing.of_lengths((4, 3, 6, 3, 2, 4, 4), parents=(None, 0, 0, None, 3, 4, 3))
CONTRACT = {
    "shared prefixes": (SHARED, None, None, None),
    "shared prefixes by blocks with a window": (SHARED, 4, 3, None),
    "middle of shared prefixes": (SHARED, 6, None, (6, 6)),
    "whole": (None, None, None, None),
    "packed": ((5, 8, 1, 12), None, None, None),
    "window": (None, 4, None, None),
    "packed with a window": ((9, 4, 13), 3, None, None),
    "blocks": (None, None, 4, None),
    "front": (None, None, None, (0, 6)),
    "middle": (None, None, None, (3, 5)),
    "middle by blocks, packed": ((5, 8, 1, 12), None, 4, (3, 7)),
    "one query in the middle": (None, None, 4, (6, 1)),
}


@pytest.mark.parametrize("operator", ON_CPU)
@pytest.mark.parametrize("case", CONTRACT)
def test_the_contract_against_softmax_by_hand(draw, case: str, operator: AttentionOperator) -> None:
    """forward gives out and LSE, backward their exact gradients, for queries anywhere in the row."""
    packing, window, block_len, span = CONTRACT[case]
    packing = Packing.of_lengths(packing) if isinstance(packing, tuple) else packing
    q, k, v = qkv(draw)
    first, count = span or (0, 13)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    exact = by_hand(*leaves, packing=packing, window=window)[:, first : first + count]
    dout = draw(*exact.shape)
    expected = torch.autograd.grad(exact, leaves, dout)
    part = q[:, first : first + count]
    options = {"block_len": block_len, "packing": packing, "window": window, "operator": operator}
    spec = spec_for(part, 13, scale=SCALE, first_query=None if span is None else first, **options)
    out, lse = attention_forward(part, k, v, spec)
    dq, dk, dv = attention_backward(dout, part, k, v, out, lse, spec)
    assert lse.shape == (2, 4, count)
    assert rel_error(out, exact.detach()) <= 2e-15
    assert rel_error(dq, expected[0][:, first : first + count]) <= 4e-15
    assert rel_error(dk, expected[1]) <= 4e-15
    assert rel_error(dv, expected[2]) <= 4e-15
    scores = torch.einsum("bqhd,bkhd->bhqk", part, k.repeat_interleave(2, dim=2)) * SCALE
    seen = seen_by_hand(2, 13, packing, window)[:, first : first + count]
    by_definition = scores.masked_fill(~seen[:, None], float("-inf")).logsumexp(-1)
    assert rel_error(lse, by_definition) <= 1e-15


def seen_by_hand(num_rows: int, num_keys: int, packing: Packing | None, window: int | None) -> torch.Tensor:
    """(rows, T, T) bool: which key a query sees, by definition."""
    lengths = (num_keys,) * num_rows if packing is None else packing.lengths
    parents = (None,) * len(lengths) if packing is None else packing.parents or (None,) * len(lengths)
    tokens: list[tuple[int, int]] = []
    path: list[set[int]] = []
    length_of: list[int] = []
    for document, (length, parent) in enumerate(zip(lengths, parents, strict=True)):
        before = 0 if parent is None else length_of[parent]
        path.append({document} if parent is None else path[parent] | {document})
        length_of.append(before + length)
        tokens += [(document, before + place) for place in range(length)]
    seen = [
        [reads in path[reader] and place >= key and (window is None or place - key < window) for reads, key in row]
        for at in range(0, len(tokens), num_keys)
        for row in [tokens[at : at + num_keys]]
        for reader, place in row
    ]
    return torch.tensor(seen).view(num_rows, num_keys, num_keys)
