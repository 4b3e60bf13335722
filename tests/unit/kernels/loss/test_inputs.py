"""Bad input ends in an error that names the argument, what came and what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headrace.kernels.api import Backend, ChunkAxis, FilterStats, LossOptions, linear_cross_entropy

HIDDEN, WEIGHT, TARGETS = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
META = torch.randn(9, 4, device="meta")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.randn(6)}, r"hidden: shape \(6,\): expected \(N, D\) or \(B, T, D\)"),
        ({"hidden": HIDDEN.long()}, "hidden: torch.int64: expected fp64, fp32, bf16 or fp16"),
        ({"hidden": [1.0]}, "hidden: list: expected a tensor"),
        ({"weight": torch.randn(9, 5)}, r"weight: shape \(9, 5\): expected \(V, 4\)"),
        ({"weight": WEIGHT.double()}, "weight: torch.float64: expected torch.float32"),
        ({"weight": META}, "weight: on meta: expected cpu"),
        ({"weight": torch.randn(0, 4)}, "weight: .*expected at least one row"),
        ({"targets": TARGETS[:5]}, r"targets: shape \(5,\): expected \(6,\)"),
        ({"targets": TARGETS.float()}, "targets: torch.float32: expected int64"),
        ({"targets": TARGETS + 4}, r"targets: label 9 at index 5 \(of 6\): expected 0 to 8, or ignore_index=-100"),
        ({"targets": TARGETS - 2}, "targets: label -2 at index 0"),
        ({"targets": torch.full((6,), -100), "ignore_index": -1}, "targets: label -100 at index 0.*ignore_index=-1"),
        ({"bias": torch.randn(8)}, r"bias: shape \(8,\): expected \(9,\)"),
        ({"bias": torch.randn(9).half()}, "bias: torch.float16: expected torch.float32"),
        ({"class_weight": torch.rand(9).requires_grad_()}, "class_weight: requires_grad=True"),
        ({"class_weight": torch.ones(9, dtype=torch.int64)}, "class_weight: torch.int64"),
        ({"softcap": 0.0}, "softcap=0.0: expected a finite number above 0"),
        ({"softcap": float("inf")}, "softcap=inf"),
        ({"shift": -1}, "shift=-1: expected 0 or above"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5: expected 0 to 1"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"reduction": "avg"}, "reduction='avg': expected one of mean, sum, none"),
        ({"num_valid": 0}, "num_valid=0: 6 labels here count"),
        ({"num_valid": -1}, "num_valid=-1"),
        ({"num_valid": torch.ones(2)}, r"num_valid: shape \(2,\)"),
        ({"num_valid": 6, "reduction": "sum"}, "num_valid=6: it divides reduction='mean'"),
        ({"options": LossOptions(axis=ChunkAxis.tokens), "reduction": "none"}, "options.axis=tokens"),
        ({"options": LossOptions(axis=ChunkAxis.tokens), "return_lse": True}, "options.axis=tokens"),
        ({"options": LossOptions(sum_dtype=torch.float16)}, "options.sum_dtype=torch.float16"),
        ({"backend": Backend.stock}, "backend=stock is QuACK"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    call = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change}
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(call.pop("hidden"), call.pop("weight"), call.pop("targets"), **call)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workspace_bytes": 0}, "workspace_bytes=0: at least 1"),
        ({"tokens_per_chunk": 0}, "tokens_per_chunk=0"),
        ({"axis": ChunkAxis.tokens, "columns_per_chunk": 8}, "columns_per_chunk is for axis=vocabulary"),
        ({"filter_eps": 0.0}, "filter_eps=0.0: above 0"),
        ({"filter_stats": FilterStats()}, "filter_stats without filter_eps"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LossOptions(**options)


def test_views_of_any_stride_are_taken() -> None:
    exact = linear_cross_entropy(HIDDEN, WEIGHT, TARGETS)
    strided = linear_cross_entropy(
        HIDDEN.t().contiguous().t(), WEIGHT.t().contiguous().t(), TARGETS.repeat(2, 1).t()[:, 0]
    )
    assert torch.allclose(strided, exact, rtol=1e-6)


def test_no_tokens_at_all() -> None:
    hidden, weight = torch.randn(0, 4).requires_grad_(), WEIGHT.clone().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, TARGETS[:0], reduction=reduction)
        loss.sum().backward()
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert not weight.grad.any()
