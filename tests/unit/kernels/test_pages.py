"""Page means, page scores and the choice of pages, against loops in fp64 and in the Triton form."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.backend import Backend
from headrace.kernels.pages import page_mean, page_score, top_pages


@pytest.fixture(params=[Backend.reference, Backend.triton], ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param is Backend.triton:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU: tests/gpu runs the kernel there")
    return request.param


def mean_in_loops(k: torch.Tensor, page_size: int) -> torch.Tensor:
    pages = [
        sum(k[:, t].double() for t in range(first, min(first + page_size, k.shape[1])))
        / (min(first + page_size, k.shape[1]) - first)
        for first in range(0, k.shape[1], page_size)
    ]
    return torch.stack(pages, dim=1)


def score_in_loops(q: torch.Tensor, means: torch.Tensor, tile: int) -> torch.Tensor:
    """Query by query and head by head, as the equation reads."""
    q, means = q.double(), means.double()
    group = q.shape[2] // means.shape[2]
    scores = torch.zeros(q.shape[0], -(-q.shape[1] // tile), means.shape[1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(means.shape[2]):
                wanted = sum(q[b, t, h * group + i] for i in range(group))
                scores[b, t // tile] += (means[b, :, h] @ wanted).softmax(0)
    return scores


@pytest.mark.parametrize(("num_tokens", "page_size"), [(1, 4), (8, 4), (45, 20), (7, 100), (3, 1)])
def test_mean_with_a_ragged_last_page(draw, backend: Backend, num_tokens: int, page_size: int) -> None:
    k = draw(2, num_tokens, 3, 5, dtype=torch.float32)
    means = page_mean(k, page_size, backend=backend)
    assert means.dtype is torch.float32
    assert rel_error(means, mean_in_loops(k, page_size)) < REL_ERROR["page_mean"][k.dtype]


def test_mean_of_a_strided_view(draw, backend: Backend) -> None:
    """Keys inside a projection, batch rows apart: padding of the page must not read the neighbour."""
    wide = draw(2, 23, 4, 9, dtype=torch.float32)
    k = wide[:, 2:, 1:3, 2:8]
    means = page_mean(k, 8, backend=backend)
    assert rel_error(means, mean_in_loops(k, 8)) < REL_ERROR["page_mean"][k.dtype]


def test_mean_of_narrow_keys_is_taken_in_fp32(draw) -> None:
    """In bf16 a sum of 512 terms near 1 stops growing at 256."""
    k = draw(1, 512, 1, 4, dtype=torch.float32).mul(0.01).add(1).bfloat16()
    assert rel_error(page_mean(k, 512), mean_in_loops(k, 512)) < REL_ERROR["page_mean"][k.dtype]
    assert page_mean(k.double(), 512).dtype is torch.float64


SHAPES = [
    # B, T, Hq, Hkv, D, P, tile
    (1, 1, 2, 1, 4, 1, 1),
    (2, 37, 6, 2, 20, 5, 16),
    (1, 9, 4, 4, 6, 130, 40),
    (1, 70, 3, 1, 17, 70, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_score(draw, backend: Backend, shape: tuple[int, ...]) -> None:
    batch_size, num_tokens, num_heads, num_kv_heads, width, num_pages, tile = shape
    q = draw(batch_size, num_tokens, num_heads, width, dtype=torch.float32)
    means = draw(batch_size, num_pages, num_kv_heads, width, dtype=torch.float32)
    scores = page_score(q, means, tile, backend=backend)
    assert scores.dtype is torch.float32
    assert rel_error(scores, score_in_loops(q, means, tile)) < REL_ERROR["page_score"][q.dtype]
    queries = torch.tensor([min(tile, num_tokens - first) for first in range(0, num_tokens, tile)])
    assert torch.allclose(scores.sum(-1), (queries * num_kv_heads).float().expand(batch_size, -1), rtol=1e-5)


def test_score_of_large_logits_and_strided_inputs(draw, backend: Backend) -> None:
    """exp of the plain logits would overflow; their rounding in fp32 bounds the error. Views of larger tensors."""
    q = draw(2, 12, 5, 10, dtype=torch.float32)[:, 1:, 1:, :8] * 100
    means = draw(2, 9, 3, 8, dtype=torch.float32)[:, 2:, :2] * 10
    scores = page_score(q, means, 4, backend=backend)
    largest = (q.unflatten(2, (2, 2)).sum(3)[:, :, None] * means[:, None]).sum(-1).abs().max()
    assert float(largest) > 1000
    assert rel_error(scores, score_in_loops(q, means, 4)) < 2.0**-24 * float(largest)


def test_wrong_formulas_are_seen(draw) -> None:
    """What a slip would compute is far outside the bound: a scale, a mean of heads, the wrong head's group."""
    q, means = draw(1, 8, 4, 6, dtype=torch.float32), draw(1, 5, 2, 6, dtype=torch.float32)
    exact = score_in_loops(q, means, 4)
    swapped = q.unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3)
    for wrong in (q / 6**0.5, q / 2, swapped):
        assert rel_error(page_score(wrong, means, 4), exact) > 1e-2


def test_top_pages_takes_the_lower_of_equal_pages_and_sorts() -> None:
    scores = torch.tensor(
        [[0.1, 0.9, 0.5, 0.5, 0.9, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    )
    assert top_pages(scores, 3).tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    assert top_pages(scores[0], 1).tolist() == [1]
    assert top_pages(scores[0], 99).tolist() == [0, 1, 2, 3, 4, 5]


def test_top_pages_by_brute_force_with_many_ties() -> None:
    scores = torch.randint(0, 4, (50, 40), generator=torch.Generator().manual_seed(0)).float()
    for row, taken in zip(scores.tolist(), top_pages(scores, 13).tolist(), strict=True):
        best = sorted(range(40), key=lambda page: (-row[page], page))[:13]
        assert taken == sorted(best)


def test_no_gradient_passes(draw) -> None:
    k = draw(1, 8, 2, 4, dtype=torch.float32).requires_grad_()
    assert not page_score(k, page_mean(k, 4), 4).requires_grad


def test_bad_input_names_the_argument(draw) -> None:
    k, means = draw(2, 8, 4, 6, dtype=torch.float32), draw(2, 3, 2, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match="page_size=0"):
        page_mean(k, 0)
    for bad in (k[0], k[:, :0], k.long(), k.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"k: .* expected"):
            page_mean(bad, 4)
    for bad in (means[:1], means[..., :5], torch.zeros(2, 3, 3, 6)):
        with pytest.raises(ValueError, match="do not fit"):
            page_score(k, bad, 4)
    with pytest.raises(ValueError, match="neither empty"):
        page_score(k, means[:, :0], 4)
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        page_score(k.transpose(2, 3).contiguous().transpose(2, 3), means, 4)
    with pytest.raises(ValueError, match="tile=0"):
        page_score(k, means, 0)
    with pytest.raises(ValueError, match="budget=0"):
        top_pages(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="backend=triton"):
        page_mean(k.bfloat16(), 4, backend=Backend.triton)
