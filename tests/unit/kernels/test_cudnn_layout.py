"""cuDNN's LSE: its layout follows a variable of the environment and the release of torch; backward takes one layout."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from headrace.kernels.attention import operators
from headrace.kernels.attention.operators import CudnnBlocks
from headrace.workers.job import RankContext
from headrace.workers.train.config import TrainConfig
from headrace.workers.train.runtime import torch_runtime

SHAPE = (2, 3, 5, 8)  # batch, heads, tokens, head size


def heads_first() -> torch.Tensor:
    return torch.randn(2, 5, 3, 8).transpose(1, 2)


@pytest.mark.parametrize("last_axis", [True, False], ids=["an axis of one", "three axes"])
@pytest.mark.parametrize("avoid_recompile", [True, False])
def test_the_backward_gets_a_contiguous_lse(
    last_axis: bool, avoid_recompile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, out, dout = (heads_first() for _ in range(5))
    lse = torch.randn(2, 5, 3).transpose(1, 2) if avoid_recompile else torch.randn(2, 3, 5)
    given: list[torch.Tensor] = []

    def backward(*args: torch.Tensor, **options: float) -> tuple[torch.Tensor, ...]:
        given.append(args[5])
        return args[1:4]

    monkeypatch.setattr(operators, "_cudnn_lse_dim", lambda index: 4 if last_axis else 3)
    monkeypatch.setattr(
        operators,
        "aten",
        SimpleNamespace(
            _scaled_dot_product_cudnn_attention=lambda *a, **b: (out, lse[..., None] if last_axis else lse),
            _scaled_dot_product_cudnn_attention_backward=backward,
        ),
    )
    got_out, got_lse = CudnnBlocks().forward(q, k, v, causal=True, scale=0.5)
    assert torch.equal(got_lse, lse)
    CudnnBlocks().backward(dout, q, k, v, got_out, got_lse, causal=True, scale=0.5)
    (seen,) = given
    assert seen.is_contiguous()
    assert torch.equal(seen[..., 0] if last_axis else seen, lse)


def test_a_run_takes_the_variable_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    with torch_runtime(TrainConfig(num_threads=1), RankContext()):
        assert "TORCH_CUDNN_SDPA_AVOID_RECOMPILE" not in os.environ
