"""Attention against softmax written out in fp64: GQA, packed documents, windows, decoding."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import Packing, attention
from headrace.kernels.attention import cut, reference_blocks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SCALE = 0.3


def visible(num_rows: int, num_queries: int, num_keys: int, lengths=None, window=None) -> torch.Tensor:
    """(B, T, S) bool by brute force: one loop over everything."""
    seen = torch.zeros(num_rows, num_queries, num_keys, dtype=torch.bool)
    document = torch.zeros(num_rows * num_keys, dtype=torch.int64)
    if lengths is not None:
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    document = document.view(num_rows, num_keys)
    for row in range(num_rows):
        for query in range(num_queries):
            place = num_keys - num_queries + query
            for key in range(place + 1):
                near = window is None or place - key < window
                seen[row, query, key] = near and document[row, key] == document[row, place]
    return seen


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


CASES = {
    "plain": ((2, 13, 13), None, None),
    "one token": ((2, 1, 1), None, None),
    "packed": ((2, 12, 12), (5, 1, 6, 12), None),
    "one document a row": ((2, 6, 6), (6, 6), None),
    "window": ((1, 13, 13), None, 4),
    "window of one": ((1, 7, 7), None, 1),
    "window as long as the row": ((1, 7, 7), None, 7),
    "packed with a window": ((1, 12, 12), (9, 3), 4),
    "decode one token": ((2, 1, 9), None, None),
    "decode several": ((1, 3, 9), None, None),
    "decode with a window": ((1, 1, 9), None, 4),
    "decode several with a window": ((1, 5, 9), None, 3),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("case", CASES)
def test_against_softmax_by_hand(check, draw, monkeypatch, case: str, heads: tuple[int, int], dtype) -> None:
    for module in (cut, reference_blocks):
        monkeypatch.setattr(module, "TILE", 4)  # so that short rows have several tiles, the last one ragged
    (rows, num_queries, num_keys), lengths, window = CASES[case]
    packing = None if lengths is None else Packing.of_lengths(lengths)
    seen = visible(rows, num_queries, num_keys, lengths, window)
    check(
        "attention",
        lambda q, k, v: attention(q, k, v, scale=SCALE, packing=packing, window=window),
        lambda q, k, v: by_hand(q, k, v, seen),
        [
            draw(rows, num_queries, heads[0], 8, dtype=dtype),
            draw(rows, num_keys, heads[1], 8, dtype=dtype),
            draw(rows, num_keys, heads[1], 8, dtype=dtype),
        ],
    )


def test_mutants_are_seen(draw) -> None:
    """A mask that is off by one, or documents that see each other, is far outside of the tolerance."""
    q, k, v = (draw(1, 12, heads, 8) for heads in (4, 2, 2))
    exact = by_hand(q, k, v, visible(1, 12, 12, (5, 7), 3))
    packing = Packing.of_lengths((5, 7))
    assert rel_error(attention(q, k, v, scale=SCALE, packing=packing, window=3), exact) < 1e-14
    for wrong in ({"packing": packing, "window": 2}, {"packing": packing}, {"window": 3}, {}):
        assert rel_error(attention(q, k, v, scale=SCALE, **wrong), exact) > 1e-2
    assert rel_error(attention(q, k, v, scale=SCALE * 1.01, packing=packing, window=3), exact) > 1e-4


def test_a_packed_document_is_bit_equal_to_the_same_alone(draw) -> None:
    q, k, v = (draw(1, 20, heads, 8, dtype=torch.float32) for heads in (4, 2, 2))
    packed = attention(q, k, v, scale=SCALE, packing=Packing.of_lengths((7, 13)))
    alone = attention(q[:, 7:], k[:, 7:], v[:, 7:], scale=SCALE)
    assert torch.equal(packed[:, 7:], alone)


@pytest.mark.parametrize("window", [None, 700])
def test_memory_on_cpu_is_linear_in_tokens(draw, window: int | None) -> None:
    """No tensor as large as one head's T x T is saved or made, forward and backward."""
    num_tokens = 4096
    q, k, v = (draw(1, num_tokens, heads, 8, dtype=torch.float32).requires_grad_() for heads in (2, 1, 1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        attention(q, k, v, scale=SCALE, window=window).sum().backward()
    largest = max(event.cpu_memory_usage for event in profiler.events())
    assert largest < num_tokens * num_tokens  # bytes; T x T of one head in fp32 would be four times that
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.name for event in profiler.events()}


def test_positions_start_again_in_every_document() -> None:
    packing = Packing.of_lengths((2, 3, 1, 4))
    assert packing.cu_seqlens.tolist() == [0, 2, 5, 6, 10]
    assert packing.positions(2, 5, torch.device("cpu")).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert not packing.is_one_per_row(2, 5)
    assert Packing.of_lengths((5, 5)).is_one_per_row(2, 5)


def test_packing_of_documents_that_continue_others() -> None:
    """Two rows: a prompt with two responses, the second of which is continued; a document alone and one behind it."""
    packing = Packing.of_lengths((3, 2, 2, 1, 4, 4), parents=(None, 0, 0, 2, None, 4))
    packing.check(2, 8)
    assert packing.positions(2, 8, torch.device("cpu")).tolist() == [
        [0, 1, 2, 3, 4, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert packing.prefixes == (0, 3, 3, 5, 0, 4)
    assert packing.sequence_lengths == (3, 5, 5, 6, 4, 8)
    first = packing.first(2, 8, 6)
    assert (first.lengths, first.parents) == ((3, 2, 1, 4, 2), (None, 0, 0, None, 3))
    assert Packing.of_lengths((3, 5)).first(1, 8, 4).parents == ()
    for lengths, parents, words in (
        ((3, 5), (None, 1), "document 1 continues document 1"),
        ((3, 1, 4), (None, None, 0), "document 2 continues document 0"),
        ((8, 8), (None, 0), "document 1 continues document 0"),
        ((3, 5), (None,), "1 parents of 2 documents"),
    ):
        with pytest.raises(ValueError, match=words):
            Packing.of_lengths(lengths, parents=parents).check(sum(lengths) // 8, 8)
