"""Merging of partial softmax results: against the softmax over everything, in any order, with empty rows."""

from __future__ import annotations

import itertools

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.merge import lse_of_max_sum, merge, merge_, merge_max_sum

EMPTY = float("-inf")
CUTS = ((0, 5), (5, 6), (6, 17))


def parts(draw, dtype: torch.dtype = torch.float64, *, spread: float = 5.0):
    """(out, lse) of every cut, and of all scores at once, for 3 x 4 rows, 17 keys, D = 6."""
    scores, values = draw(3, 4, 17, dtype=dtype) * spread, draw(3, 17, 6, dtype=dtype)

    def attend(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = scores[..., first:last]
        return part.softmax(-1) @ values[:, first:last], part.logsumexp(-1)

    return [attend(*cut) for cut in CUTS], attend(0, 17)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_any_order_is_the_softmax_over_everything(draw, dtype, bound: float, spread: float) -> None:
    found, (out, lse) = parts(draw, dtype, spread=spread)
    for first, second, third in itertools.permutations(found):
        left = merge(*merge(*first, *second), *third)
        right = merge(*first, *merge(*second, *third))
        for got in (left, right):
            assert rel_error(got[0], out) <= bound
            assert rel_error(got[1], lse) <= bound


def test_a_forgotten_or_doubled_part_is_seen(draw) -> None:
    found, (out, lse) = parts(draw, spread=1.0)
    forgotten = merge(*found[0], *found[1])
    doubled = merge(*merge(*merge(*found[0], *found[1]), *found[2]), *found[2])
    for wrong in (forgotten, doubled):
        assert rel_error(wrong[0], out) > 1e-2
        assert rel_error(wrong[1], lse) > 1e-2


def test_in_place_gives_the_same_bits_and_takes_strided_views(draw) -> None:
    found, _ = parts(draw)
    expected = merge(*found[0], *found[1])
    store, lse = torch.zeros(4, 3, 6, dtype=torch.float64), found[0][1].clone()
    out = store.transpose(0, 1)
    out.copy_(found[0][0])
    merge_(out, lse, *found[1])
    assert torch.equal(store.transpose(0, 1), expected[0])
    assert torch.equal(lse, expected[1])


def test_merge_leaves_its_inputs_alone(draw) -> None:
    found, _ = parts(draw)
    before = [tensor.clone() for part in found[:2] for tensor in part]
    merge(*found[0], *found[1])
    assert all(torch.equal(a, b) for a, b in zip(before, (*found[0], *found[1]), strict=True))


def test_a_narrow_part_is_added_to_a_wide_accumulator(draw) -> None:
    found, _ = parts(draw, torch.float32)
    narrow = found[1][0].bfloat16()
    got = merge(*found[0], narrow, found[1][1])
    expected = merge(*found[0], narrow.float(), found[1][1])
    assert got[0].dtype is torch.float32
    assert torch.equal(got[0], expected[0])


def test_an_fp64_lse_keeps_many_merges_near_the_softmax(draw) -> None:
    """128 parts of 16 keys each, fp32: about one rounding of an LSE, not a walk of them."""
    scores, values = draw(64, 128, 16, dtype=torch.float32), draw(128, 16, 8, dtype=torch.float32)
    exact = scores.double().flatten(1).softmax(-1) @ values.double().flatten(0, 1)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        out, lse = torch.zeros(64, 8), torch.full((64,), EMPTY, dtype=dtype)
        for i in range(128):
            merge_(out, lse, scores[:, i].softmax(-1) @ values[i], scores[:, i].logsumexp(-1))
        errors[dtype] = rel_error(out, exact)
    assert errors[torch.float64] < 1e-6
    assert errors[torch.float64] < 0.5 * errors[torch.float32]


def test_rows_that_saw_nothing_weigh_nothing(draw) -> None:
    out, lse = draw(2, 3), torch.tensor([0.5, EMPTY], dtype=torch.float64)
    nothing = torch.full((2,), EMPTY, dtype=torch.float64)
    for merged in (merge(out, lse, torch.ones(2, 3), nothing), merge(torch.ones(2, 3), nothing, out, lse)):
        assert torch.equal(merged[0][0], out[0])
        assert torch.equal(merged[0][1], torch.zeros(3, dtype=torch.float64))
        assert torch.equal(merged[1], lse)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
def test_max_and_sum(draw, dtype, bound: float) -> None:
    scores = draw(4, 17, dtype=dtype) * 100
    scores[0, :6] = EMPTY
    scores[1] = EMPTY
    total = (torch.full((4,), EMPTY, dtype=dtype), torch.zeros(4, dtype=dtype))
    for first, last in CUTS:
        largest = scores[:, first:last].amax(-1)
        shifted = torch.where(largest[:, None] == EMPTY, EMPTY, scores[:, first:last] - largest[:, None])
        total = merge_max_sum(*total, largest, shifted.exp().sum(-1))
    assert torch.equal(total[0], scores.amax(-1))
    lse, exact = lse_of_max_sum(*total), scores.logsumexp(-1)
    assert lse[1] == exact[1] == EMPTY
    seen = torch.tensor([0, 2, 3])
    assert rel_error(lse[seen], exact[seen]) <= bound


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: lse_of_max_sum(x.half(), x.half()), "largest is torch.float16"),
        (lambda x: lse_of_max_sum(x, x[:1]), r"total is torch.float64 \(1, 3\)"),
        (lambda x: merge_max_sum(x, x, x, x[0]), "sum_b"),
        (lambda x: lse_of_max_sum(x, x.float()), "total"),
        (lambda x: merge_(x.half(), x[:, 0].clone(), x, x[:, 0]), "out is torch.float16"),
        (lambda x: merge_(x.clone(), x[:, 0].clone(), x, x[:, 0].half()), "other_lse is torch.float16"),
        (lambda x: merge_(x.clone(), x[0].clone(), x, x[0]), "do not fit"),
        (lambda x: merge(x, x[:, 0], x[:, :2], x[:, 0]), r"other_out \(2, 2\)"),
    ],
)
def test_bad_arguments(draw, call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(draw(2, 3))
