"""Streaming attention on CUDA: every block operator against softmax in fp64 on the CPU; bits, sources, memory."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import (
    AttentionOperator,
    AttentionSpec,
    Packing,
    ResidentBlocks,
    attention,
    attention_backward_blocks,
    attention_forward_blocks,
    block_bounds,
    choose_operator,
)

pytestmark = pytest.mark.gpu
SCALE = 0.125
STOCK = [AttentionOperator.cudnn, AttentionOperator.flash, AttentionOperator.fa4]
# name: (queries, keys), keys of a block, packing, window, (query heads, key heads), head dim
CASES = {
    "blocks": ((1024, 1024), 256, None, None, (8, 2), 64),
    "ragged last block": ((1000, 1000), 256, None, None, (4, 4), 128),
    "chunk over a prefix": ((256, 1024), 256, None, None, (8, 1), 64),
    "chunk within a block": ((384, 1024), 512, None, None, (7, 1), 128),
    "packed": ((1024, 1024), 256, (300, 1, 723, 1024), None, (8, 2), 64),
    "window below a block": ((1024, 1024), 512, None, 200, (8, 2), 64),
    "window above a block": ((1024, 1024), 256, None, 600, (8, 2), 64),
}


def need(operator: AttentionOperator) -> None:
    """Skip where the card or the machine does not have the operator."""
    if operator is AttentionOperator.fa4 and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed")
    if operator is not AttentionOperator.flash and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"{operator.value} needs Hopper or later")


def draw(case: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and a cotangent, on the CPU."""
    (num_queries, num_keys), _, lengths, _, (query_heads, key_heads), head_dim = CASES[case]
    generator = torch.Generator().manual_seed(0)
    rows = 1 if lengths is None else 2
    shapes = ((num_queries, query_heads), (num_keys, key_heads), (num_keys, key_heads), (num_queries, query_heads))
    *qkv, cotangent = (torch.randn(rows, *shape, head_dim, generator=generator).to(dtype) for shape in shapes)
    return qkv, cotangent


def results(case: str, operator: AttentionOperator, dtype: torch.dtype, device: str, wide: torch.dtype):
    """Output and gradients of q, k, v."""
    _, block_len, lengths, window, *_ = CASES[case]
    qkv, cotangent = draw(case, dtype)
    leaves = [tensor.to(device, wide).requires_grad_() for tensor in qkv]
    packing = None if lengths is None else Packing.of_lengths(lengths, device)
    masks = {"packing": packing, "window": window, "operator": operator}
    out = attention(*leaves, scale=SCALE, block_len=block_len, **masks)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(device, wide))]


def errors(case: str, operator: AttentionOperator, dtype: torch.dtype) -> list[float]:
    got = results(case, operator, dtype, "cuda", dtype)
    exact = results(case, AttentionOperator.reference, dtype, "cpu", torch.float64)
    return [rel_error(a.cpu(), b) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", STOCK)
def test_narrow_operators(case: str, dtype: torch.dtype, operator: AttentionOperator) -> None:
    need(operator)
    assert max(errors(case, operator, dtype)) <= REL_ERROR["attention"][dtype]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_take_the_reference(case: str, dtype: torch.dtype) -> None:
    assert choose_operator(AttentionOperator.auto, draw(case, dtype)[0][0].cuda()).value == "reference"
    assert max(errors(case, AttentionOperator.auto, dtype)) <= REL_ERROR["attention"][dtype]


@pytest.mark.parametrize("operator", STOCK)
def test_streaming_is_no_worse_than_the_operator_on_the_whole(operator: AttentionOperator) -> None:
    """One call over the whole prefix, in the same dtype, is the measure: partial results cost at most a quarter."""
    need(operator)
    qkv, cotangent = draw("blocks", torch.bfloat16)
    leaves = [tensor.cuda().requires_grad_() for tensor in qkv]
    out = attention(*leaves, scale=SCALE, operator=operator)
    whole = [out.detach(), *torch.autograd.grad(out, leaves, cotangent.cuda())]
    exact = results("blocks", AttentionOperator.reference, torch.bfloat16, "cpu", torch.float64)
    for ours, theirs, oracle in zip(
        results("blocks", operator, torch.bfloat16, "cuda", torch.bfloat16), whole, exact, strict=True
    ):
        assert rel_error(ours.cpu(), oracle) <= 1.25 * rel_error(theirs.cpu(), oracle)


@pytest.mark.parametrize("operator", [AttentionOperator.flash, AttentionOperator.fa4])
def test_deterministic_operators_repeat_their_bits(operator: AttentionOperator) -> None:
    need(operator)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [results("blocks", operator, torch.bfloat16, "cuda", torch.bfloat16) for _ in range(4)]
        q = draw("blocks", torch.bfloat16)[0][0].cuda()
        assert choose_operator(AttentionOperator.auto, q) is AttentionOperator.flash
        with pytest.raises(ValueError, match="cudnn: its backward is not deterministic"):
            choose_operator(AttentionOperator.cudnn, q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


class PinnedBlocks:
    """Blocks in pinned host memory, copied to the device when asked for."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, bounds) -> None:
        self.far = [tuple(tensor[:, begin:end].cpu().pin_memory() for tensor in (k, v)) for begin, end in bounds]

    def fetch(self, order):
        for index in order:
            yield tuple(tensor.to("cuda", non_blocking=True) for tensor in self.far[index])


def test_pinned_blocks_give_the_bits_of_resident_ones() -> None:
    (q, k, v), cotangent = draw("packed", torch.bfloat16)
    q, k, v, dout = (tensor.cuda() for tensor in (q, k, v, cotangent))
    bounds = block_bounds(1024, 256)
    packing = Packing.of_lengths((300, 1, 723, 1024), "cuda")
    spec = AttentionSpec(SCALE, 1024, AttentionOperator.flash, block_len=256, packing=packing)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for source in (ResidentBlocks(k, v, bounds), PinnedBlocks(k, v, bounds)):
            grads: list[torch.Tensor] = []
            out, lse = attention_forward_blocks(q, source, spec)
            sink = lambda index, dk, dv, into=grads: into.extend((dk, dv))  # noqa: E731
            found.append([attention_backward_blocks(dout, q, out, lse, source, sink, spec), out, lse, *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("operator", STOCK)
def test_memory_does_not_grow_with_the_prefix(operator: AttentionOperator) -> None:
    """Blocks made one by one: the peak over 16 of them is that over 4, and no key head is copied."""
    need(operator)
    q = torch.randn(1, 512, 32, 128, device="cuda", dtype=torch.bfloat16)
    block_len, peaks = 2048, []

    class Fresh:
        def fetch(self, order):
            for index in order:
                generator = torch.Generator("cuda").manual_seed(index)
                size = (1, block_len, 4, 128)
                k, v = (torch.randn(size, device="cuda", dtype=q.dtype, generator=generator) for _ in range(2))
                yield k, v
                del k, v

    for num_blocks in (4, 4, 16):  # the first one warms up
        spec = AttentionSpec(SCALE, num_blocks * block_len, operator, block_len=block_len)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, lse = attention_forward_blocks(q, Fresh(), spec)
        attention_backward_blocks(out, q, out, lse, Fresh(), lambda *_: None, spec)
        del out, lse
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= peaks[1] * 1.01
