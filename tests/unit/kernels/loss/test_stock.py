"""backend=stock: what QuACK is handed, and what is refused by name. The package itself needs a GPU: tests/gpu."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.kernels.api import Backend, LossOptions, linear_cross_entropy
from headrace.kernels.loss import stock

HIDDEN, WEIGHT = torch.randn(16, 8).bfloat16(), torch.randn(24, 8).bfloat16()
TARGETS = torch.where(torch.arange(16) % 3 == 0, -100, torch.arange(16))


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in that takes QuACK's arguments, computes from logits, and scales its gradients in place as it does."""
    calls: list[dict[str, Any]] = []

    def chunked_linear_cross_entropy(
        x: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        chunk_size: int = 4096,
        ignore_index: int = -100,
        reduction: str = "mean",
        tuned: bool = True,
        use_scaled_exp: bool | None = None,
    ) -> torch.Tensor:
        calls.append({"chunk_size": chunk_size, "reduction": reduction, "tuned": tuned})
        return F.cross_entropy((x @ weight.T).float(), target, ignore_index=ignore_index, reduction=reduction)

    package, module = ModuleType("quack"), ModuleType("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy = chunked_linear_cross_entropy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    monkeypatch.setattr(stock, "check", lambda *_: None)
    return calls


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "the tensors are on cpu, it needs CUDA"),
        ({"bias": torch.zeros(24).bfloat16()}, "it has no bias"),
        ({"softcap": 30.0}, "it has no softcap"),
        ({"label_smoothing": 0.1}, "it has no label_smoothing"),
        ({"class_weight": torch.ones(24)}, "it has no class_weight"),
        ({"z_loss": 0.1}, "it has no z_loss"),
        ({"reduction": "none"}, "it has no reduction='none'"),
        ({"return_lse": True}, "it has no return_lse"),
        ({"options": LossOptions(filter_eps=0.1)}, "it has no filter_eps"),
        ({"weight": WEIGHT[:20]}, "multiples of 8, not vocabulary of 20"),
        ({"hidden": HIDDEN.float(), "weight": WEIGHT.float()}, "it takes bf16, not torch.float32"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(change: dict[str, Any], words: str) -> None:
    call = {"hidden": HIDDEN, "weight": WEIGHT, **change}
    with pytest.raises(ValueError, match=f"backend=stock is QuACK.*{words}.*backend=auto computes this"):
        linear_cross_entropy(call.pop("hidden"), call.pop("weight"), TARGETS, backend=Backend.stock, **call)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_what_it_is_handed(quack, reduction) -> None:
    options = LossOptions(tokens_per_chunk=4096)
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()]
    loss = linear_cross_entropy(*leaves, TARGETS, reduction=reduction, options=options, backend=Backend.stock)
    exact = F.cross_entropy((leaves[0] @ leaves[1].T).float(), TARGETS, reduction=reduction)
    # The division is ours: over all ranks' tokens, and none at all is 0.
    assert quack == [{"chunk_size": 4096, "reduction": "sum", "tuned": False}]
    assert torch.allclose(loss, exact)
    got, expected = (torch.autograd.grad(out, leaves, retain_graph=True) for out in (loss, exact))
    assert all(torch.allclose(a.float(), b.float(), atol=1e-2) for a, b in zip(got, expected, strict=True))
    with pytest.raises(RuntimeError, match="backward runs once"):
        torch.autograd.grad(loss, leaves)


def test_tuning_by_the_clock_only_where_determinism_is_waived(quack) -> None:
    options = LossOptions(deterministic=False, workspace_bytes=1)
    ignored = torch.full_like(TARGETS, -100)
    assert linear_cross_entropy(HIDDEN, WEIGHT, ignored, options=options, backend=Backend.stock) == 0.0
    assert quack == [{"chunk_size": 128, "reduction": "sum", "tuned": True}]


def test_chunks_follow_the_workspace_in_multiples_of_128() -> None:
    assert stock.chunk_tokens(256_000, LossOptions()) == 256
    assert stock.chunk_tokens(128_256, LossOptions(workspace_bytes=4096 * 4 * 128_256)) == 4096
