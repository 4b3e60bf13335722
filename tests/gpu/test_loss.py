"""The loss head on CUDA: both axes, torch and Triton steps, dtypes, the memory it may take, and QuACK."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import Backend, ChunkAxis, LossOptions, linear_cross_entropy

pytestmark = pytest.mark.gpu
AXES = {
    "tokens": LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=128),
    "vocabulary": LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=128, columns_per_chunk=384),
}
MIB = 2**20


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", [Backend.reference, Backend.triton])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("terms", [{}, {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 0.01}], ids=["plain", "all"])
def test_against_fp64(dtype: torch.dtype, backend: Backend, axis: str, terms: dict[str, Any]) -> None:
    inputs = [draw(301, 320, dtype=dtype, scale=0.1), draw(1003, 320, dtype=dtype), draw(1003, dtype=dtype)]
    targets = torch.arange(301, device="cuda") * 3
    targets[::7] = -100
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], options=AXES[axis], backend=backend, **terms
    )
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    logits = exact[0] @ exact[1].T + exact[2]
    logits = 2.0 * torch.tanh(logits / 2.0) if terms else logits
    expected = F.cross_entropy(logits, targets, label_smoothing=terms.get("label_smoothing", 0.0))
    valid = targets != -100
    expected = expected + terms.get("z_loss", 0.0) * logits.logsumexp(-1)[valid].square().mean()
    found = [
        rel_error(a, b)
        for a, b in zip(
            [loss, *torch.autograd.grad(loss, leaves)], [expected, *torch.autograd.grad(expected, exact)], strict=True
        )
    ]
    assert max(found) <= REL_ERROR["linear_cross_entropy"][dtype], found


@pytest.mark.parametrize("axis", [ChunkAxis.tokens, ChunkAxis.vocabulary])
@pytest.mark.parametrize("backend", [Backend.reference, Backend.triton])
def test_extra_memory_is_the_sums_and_the_workspace(axis: ChunkAxis, backend: Backend) -> None:
    """At most both gradients in fp32 and 64 MiB here, as 256 MiB at full size; the logits would take 1,000 MiB."""
    num_tokens, vocab_size, width = 4096, 64_000, 512
    hidden, weight = (draw(n, width, dtype=torch.bfloat16).requires_grad_() for n in (num_tokens, vocab_size))
    targets, options = torch.arange(num_tokens, device="cuda"), LossOptions(axis=axis, workspace_bytes=64 * MIB)
    for _ in range(2):  # the first call also takes cuBLAS' workspace
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_cross_entropy(hidden, weight, targets, softcap=30.0, options=options, backend=backend).backward()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 4 * (num_tokens + vocab_size) * width + 64 * MIB + 2 * MIB, extra / MIB


@pytest.mark.parametrize("backend", [Backend.reference, Backend.triton])
def test_twice_is_bit_equal(backend: Backend) -> None:
    hidden, weight = draw(1000, 256, dtype=torch.bfloat16), draw(5003, 256, dtype=torch.bfloat16)
    for options in AXES.values():
        runs = []
        for _ in range(3):
            leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            loss = linear_cross_entropy(*leaves, torch.arange(1000, device="cuda"), options=options, backend=backend)
            runs.append([loss, *torch.autograd.grad(loss, leaves)])
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_a_label_beyond_the_vocabulary_is_an_error_and_no_device_assert() -> None:
    hidden, weight = draw(4, 16, dtype=torch.float32), draw(8, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match="label 8 at index 3"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100, 8], device="cuda"))
    torch.cuda.synchronize()


@pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="quack-kernels is not installed")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_quack(reduction: str) -> None:
    inputs = [draw(1024, 512, dtype=torch.bfloat16, scale=0.1), draw(8192, 512, dtype=torch.bfloat16)]
    targets = torch.arange(1024, device="cuda")
    targets[::5] = -100
    results = []
    for backend in (Backend.stock, Backend.reference):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        loss = linear_cross_entropy(*leaves, targets, reduction=reduction, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert max(rel_error(a, b) for a, b in zip(*results, strict=True)) <= 1e-2
