"""The attention operators and the tiled loss on CUDA, against the CPU reference in fp64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import AttentionOperator, ChunkAxis, LossOptions, Packing, attention, linear_cross_entropy

pytestmark = pytest.mark.gpu
HEAD_SIZE = 64
SCALE = HEAD_SIZE**-0.5
CASES = {
    "plain": ((2, 384, 384), None, None),
    "packed": ((2, 384, 384), (128, 256, 100, 284), None),
    "window": ((1, 384, 384), None, 100),
    "packed with a window": ((1, 384, 384), (130, 254), 100),
    "last queries": ((1, 128, 384), None, None),
}


def errors(case: str, operator: AttentionOperator, dtype: torch.dtype) -> list[float]:
    """Of the output and of the gradients of q, k, v."""
    (rows, num_queries, num_keys), lengths, window = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, num_queries, 8), (rows, num_keys, 2), (rows, num_keys, 2), (rows, num_queries, 8))
    *qkv, cotangent = (torch.randn(*shape, HEAD_SIZE, generator=generator).to(dtype) for shape in shapes)
    results = []
    for device, wide, chosen in (("cuda", dtype, operator), ("cpu", torch.float64, AttentionOperator.reference)):
        leaves = [tensor.to(device, wide).requires_grad_() for tensor in qkv]
        packing = None if lengths is None else Packing.of_lengths(lengths, device)
        out = attention(*leaves, scale=SCALE, packing=packing, window=window, operator=chosen)
        grads = torch.autograd.grad(out, leaves, cotangent.to(device, wide))
        results.append([tensor.detach().cpu() for tensor in (out, *grads)])
    return [rel_error(got, oracle) for got, oracle in zip(*results, strict=True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operator", list(AttentionOperator))
def test_bf16_operators(case: str, operator: AttentionOperator) -> None:
    if operator is AttentionOperator.fa4 and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed")
    assert max(errors(case, operator, torch.bfloat16)) < REL_ERROR["attention"][torch.bfloat16]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_takes_wide_dtypes(case: str, dtype: torch.dtype) -> None:
    assert max(errors(case, AttentionOperator.auto, dtype)) < REL_ERROR["attention"][dtype]


def test_auto_under_deterministic_algorithms_repeats_its_bits() -> None:
    q, k = (torch.randn(1, 1024, heads, HEAD_SIZE, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(4):
            leaves = [tensor.clone().requires_grad_() for tensor in (q, k, k)]
            out = attention(*leaves, scale=SCALE)
            runs.append([out, *torch.autograd.grad(out, leaves, q)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tiled_loss(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((300, 64), (1000, 64)))
    targets = torch.randint(0, 1000, (300,), generator=generator)
    targets[::7] = -100
    leaves = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    oracles = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    options = LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=128)
    loss = linear_cross_entropy(*leaves, targets.cuda(), reduction="sum", options=options)
    exact = F.cross_entropy(oracles[0] @ oracles[1].T, targets, reduction="sum")
    got = [loss, *torch.autograd.grad(loss / 250, leaves)]
    expected = [exact, *torch.autograd.grad(exact / 250, oracles)]
    bound = REL_ERROR["linear_cross_entropy"][dtype]
    assert max(rel_error(a.cpu(), b) for a, b in zip(got, expected, strict=True)) < bound
