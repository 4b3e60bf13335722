"""Linear and cross-entropy in tiles against the plain one in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.api import linear_cross_entropy
from headrace.kernels.reference import loss as loss_module
from headrace.kernels.tolerances import rel_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NUM_TOKENS, WIDTH, VOCAB = 37, 16, 53


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
        lambda h, w: linear_cross_entropy(h, w, targets, tile=tile),
        lambda h, w: F.cross_entropy(h @ w.T, targets, reduction="sum"),
        [draw(NUM_TOKENS, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype)],
    )


def test_result_types_and_batch_shape(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(1, NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH)
    expected = F.cross_entropy(hidden[0] @ weight.T, targets, reduction="sum")
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        loss = linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets[None], tile=10)
        assert loss.dtype is wide
        assert loss.shape == ()
        assert float(loss) == pytest.approx(float(expected), rel=5e-2 if dtype is torch.bfloat16 else 1e-5)


def test_same_value_with_and_without_gradients(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=torch.float32), draw(VOCAB, WIDTH, dtype=torch.float32)
    plain = linear_cross_entropy(hidden, weight, targets, tile=8)
    assert torch.equal(plain, linear_cross_entropy(hidden.requires_grad_(), weight, targets, tile=8).detach())


def test_only_the_gradients_that_are_wanted(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH)
    linear_cross_entropy(hidden.requires_grad_(), weight, targets, tile=8).backward()
    alone = hidden.grad
    hidden.grad = None
    linear_cross_entropy(hidden, weight.requires_grad_(), targets, tile=8).backward()
    assert torch.equal(alone, hidden.grad)
    weight_grad, weight.grad = weight.grad, None
    linear_cross_entropy(hidden.detach(), weight, targets, tile=8).backward()
    assert torch.equal(weight_grad, weight.grad)


def test_no_target_at_all_is_zero_with_zero_gradients(draw) -> None:
    hidden, weight = draw(5, WIDTH).requires_grad_(), draw(VOCAB, WIDTH).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full((5,), -100), tile=2)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_twice_is_bit_equal_and_the_upstream_gradient_is_not_rounded(draw, targets: torch.Tensor) -> None:
    """1 / 3 in bf16 is off by 2e-3: a scale taken in bf16 would bias every gradient by that."""
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=torch.bfloat16), draw(VOCAB, WIDTH, dtype=torch.bfloat16)

    def gradients(scale: float) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        (linear_cross_entropy(*leaves, targets, tile=8) * scale).backward()
        return [leaf.grad for leaf in leaves]

    first, second, whole = gradients(1 / 3), gradients(1 / 3), gradients(1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for third, one in zip(first, whole, strict=True):
        bias = float((third.double() * one.double()).sum() / one.double().square().sum()) * 3 - 1
        assert abs(bias) < 8e-4, bias


def test_second_backward_is_refused(draw, targets: torch.Tensor) -> None:
    loss = linear_cross_entropy(draw(NUM_TOKENS, WIDTH).requires_grad_(), draw(VOCAB, WIDTH), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_logits_of_one_tile_at_a_time(draw, targets: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = loss_module._product

    def spy(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append((a.shape[0], b.shape[1]))
        return real(a, b, dtype)

    monkeypatch.setattr(loss_module, "_product", spy)
    linear_cross_entropy(draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), targets, tile=8)
    assert seen == [(8, VOCAB)] * 4 + [(5, VOCAB)]


def test_mutant_mean_of_tile_means_fails(draw, targets: torch.Tensor) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH)
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    parts = [F.cross_entropy(h @ weight.T, t) for h, t in zip(hidden.split(20), targets.split(20), strict=True)]
    mutant = torch.stack(parts).mean() * (targets != -100).sum()
    assert rel_error(linear_cross_entropy(hidden, weight, targets, tile=20), exact) < 1e-13
    assert rel_error(mutant, exact) > 1e-4


@pytest.mark.parametrize(("tile", "num_targets"), [(0, NUM_TOKENS), (8, NUM_TOKENS - 1)])
def test_bad_arguments(draw, targets: torch.Tensor, tile: int, num_targets: int) -> None:
    with pytest.raises(ValueError, match=r"tile|do not fit"):
        linear_cross_entropy(draw(NUM_TOKENS, WIDTH), draw(VOCAB, WIDTH), targets[:num_targets], tile=tile)
