"""The loss as the decoder calls it: a sum, cut along the tokens at a fixed tile. Other terms and cuts: loss/."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import ChunkAxis, LossOptions, linear_cross_entropy
from headrace.kernels.loss import problem as problem_module

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NUM_TOKENS, WIDTH, VOCAB = 37, 16, 53


def tiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, tile: int = 1024) -> torch.Tensor:
    options = LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=tile)
    return linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


@pytest.fixture
def targets() -> torch.Tensor:
    drawn = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    drawn[::5] = -100
    drawn[8:16] = -100  # a whole tile of 8 without a target
    return drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 8, 36, 37, 1024])
def test_against_fp64_with_ragged_tiles(check, draw, targets: torch.Tensor, dtype: torch.dtype, tile: int) -> None:
    check(
        "linear_cross_entropy",
        lambda h, w: tiled(h, w, targets, tile),
        lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"),
        [draw(NUM_TOKENS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_the_plain_loop(draw, targets: torch.Tensor, dtype: torch.dtype) -> None:
    """Bit for bit what a loop over logsumexp and softmax - onehot gives; runs resumed from older ones rely on it."""
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype)
    loss, d_hidden, d_weight = torch.zeros((), dtype=torch.float64), torch.zeros_like(hidden), torch.zeros(VOCAB, WIDTH)
    for rows in (slice(begin, begin + 8) for begin in range(0, NUM_TOKENS, 8)):
        counts = targets[rows] != -100
        labels = torch.where(counts, targets[rows], 0)
        logits = hidden[rows].float() @ weight.t().float()
        lse = logits.logsumexp(-1)
        loss += torch.where(counts, lse - logits.gather(1, labels[:, None])[:, 0], 0.0).sum(dtype=torch.float64)
        d_logits = (((logits - lse[:, None]).exp() - F.one_hot(labels, VOCAB)) * counts[:, None]).to(dtype)
        d_hidden[rows] = d_logits @ weight
        d_weight += d_logits.float().t() @ hidden[rows].float()
    upstream = torch.tensor(1 / 3)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    got = tiled(*leaves, targets, 8)
    gradients = torch.autograd.grad(got, leaves, upstream)
    assert torch.equal(got.detach(), loss.float())
    assert torch.equal(gradients[0], (d_hidden.float() * upstream).to(dtype))
    assert torch.equal(gradients[1], (d_weight * upstream).to(dtype))


def test_result_types_and_batch_shape(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(1, NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH)
    expected = F.cross_entropy(hidden[0] @ weight.T, targets, reduction="sum")
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        loss = tiled(hidden.to(dtype), weight.to(dtype), targets[None], 10)
        assert loss.dtype is wide
        assert loss.shape == ()
        assert float(loss) == pytest.approx(float(expected), rel=5e-2 if dtype is torch.bfloat16 else 1e-5)


def test_same_value_with_and_without_gradients(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=torch.float32), draw(VOCAB, WIDTH, dtype=torch.float32)
    plain = tiled(hidden, weight, targets, 8)
    assert torch.equal(plain, tiled(hidden.requires_grad_(), weight, targets, 8).detach())
    with torch.no_grad():
        assert torch.equal(plain, tiled(hidden, weight, targets, 8))


def test_twice_is_bit_equal_and_the_upstream_gradient_is_not_rounded(draw, targets: torch.Tensor) -> None:
    """1 / 3 in bf16 is off by 2e-3: a scale taken in bf16 would bias every gradient by that."""
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=torch.bfloat16), draw(VOCAB, WIDTH, dtype=torch.bfloat16)

    def gradients(scale: float) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (tiled(*leaves, targets, 8) * scale).backward()
        return [leaf.grad for leaf in leaves]

    first, second, whole = gradients(1 / 3), gradients(1 / 3), gradients(1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for third, one in zip(first, whole, strict=True):
        bias = float((third.double() * one.double()).sum() / one.double().square().sum()) * 3 - 1
        assert abs(bias) < 8e-4, bias


def test_logits_of_one_tile_at_a_time(draw, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = problem_module.product

    def spy(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append((a.shape[0], b.shape[1]))
        return real(a, b, dtype)

    monkeypatch.setattr(problem_module, "product", spy)
    tiled(draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), targets, 8)
    assert seen == [(8, VOCAB)] * 3 + [(5, VOCAB)]  # the tile without a target is left out


def test_mutant_mean_of_tile_means_fails(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    parts = [F.cross_entropy(h @ weight.T, t) for h, t in zip(hidden.split(20), targets.split(20), strict=True)]
    mutant = torch.stack(parts).mean() * (targets != -100).sum()
    assert rel_error(tiled(hidden, weight, targets, 20), exact) < 1e-13
    assert rel_error(mutant, exact) > 1e-4
