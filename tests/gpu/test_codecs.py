"""The codecs' kernels on CUDA: the bits of the CPU reference in every dtype, offsets beyond 2^31, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import rel_error
from headrace.kernels.backend import Backend
from headrace.kernels.codecs.activations import Activation, derivative, fixed_grid
from headrace.kernels.codecs.config import CodecName, Rounding
from headrace.kernels.codecs.derivative import FourBitDerivative
from headrace.kernels.codecs.grid import FOUR_BIT_LEVELS, to_codes, unpack_nibbles
from headrace.kernels.codecs.metrics import stash_error
from headrace.kernels.codecs.philox import philox
from headrace.kernels.codecs.registry import build_codec
from headrace.kernels.codecs.s2a import gelu_s2a, silu_s2a, swiglu_s2a

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 8, 128), (5, 3, 1111), (1, 7, 4096), (3, 2, 1)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers of size 3 with an outlier, a constant row and a row of numbers below fp32's normal ones."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x.view(-1)[-1] = 1e4
    rows = x.view(-1, shape[-1])
    rows[0] = 0.7
    rows[1] *= 1e-39
    return x.to(dtype)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(CodecName))
def test_bits_of_the_cpu_reference(
    name: CodecName, shape: tuple[int, ...], dtype: torch.dtype, rounding: Rounding
) -> None:
    """Derivatives are computed with another exp: there a code in 10,000 may differ, by one."""
    codec, x = build_codec(name, rounding), numbers(shape, dtype)
    for seed in (1, 2**62 + 3):
        theirs = codec.encode(x, seed=seed, stream=2)
        for backend in (Backend.triton, Backend.reference):
            ours = codec.encode(x.cuda(), seed=seed, stream=2, backend=backend)
            on_cpu = ours.with_payload([tensor.cpu() for tensor in ours.payload])
            if name.value.startswith("derivative"):
                codes = [unpack_nibbles(found.payload[0], x.numel()).int() for found in (on_cpu, theirs)]
                assert (codes[0] - codes[1]).abs().max() <= 1
                assert (codes[0] != codes[1]).sum() <= 1 + x.numel() // 10_000
            else:
                for got, expected in zip(on_cpu.payload, theirs.payload, strict=True):
                    assert torch.equal(got, expected)
            decoded = codec.decode(ours, backend=backend).cpu()
            assert torch.equal(decoded, codec.decode(on_cpu))


@pytest.mark.parametrize("name", list(CodecName))
def test_measured_error_is_as_predicted(name: CodecName) -> None:
    codec, x = build_codec(name), torch.randn(256, 8, 512, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    found = stash_error(codec, x, codec.encode(x, seed=3, backend=Backend.triton))
    assert found.measured == pytest.approx(found.predicted, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_s2a(dtype: torch.dtype) -> None:
    """Against fp64 autograd: the error that 4 bits cost on normal numbers, no more; the same by both backends."""
    generator = torch.Generator().manual_seed(0)
    gate, up, cotangent = (torch.randn(300, 1029, generator=generator).cuda().to(dtype) for _ in range(3))
    cases = (
        (lambda x, _, b: silu_s2a(x, seed=3, backend=b), lambda x, _: F.silu(x), 0.06),
        (lambda x, _, b: gelu_s2a(x, seed=3, backend=b), lambda x, _: F.gelu(x), 0.06),
        (lambda x, u, b: swiglu_s2a(x, u, seed=3, backend=b), lambda x, u: F.silu(x) * u, 0.25),
    )
    for call, oracle, bound in cases:
        wide = [tensor.double().requires_grad_() for tensor in (gate, up)]
        exact = torch.autograd.grad(oracle(*wide), wide, cotangent.double(), allow_unused=True)
        found = []
        for backend in (Backend.triton, Backend.reference):
            leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
            found.append(torch.autograd.grad(call(*leaves, backend), leaves, cotangent, allow_unused=True))
        for got, theirs, expected in zip(*found, exact, strict=True):
            if expected is not None:
                assert got.dtype is dtype
                assert rel_error(got, expected) < bound
                assert rel_error(got, theirs) < 2e-3


def test_no_gradient_leaves_more_than_its_codes() -> None:
    """What is allocated between forward and backward, in bytes per element: y, and 1.125 for swiglu."""
    gate, up = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    before = torch.cuda.memory_allocated()
    y = swiglu_s2a(gate, up, seed=1, backend=Backend.triton)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert kept / y.numel() == pytest.approx(1.125, abs=0.01)


@pytest.mark.soak
def test_offsets_beyond_32_bits() -> None:
    """2^31 + 4,100 elements in bf16: the last codes, against the formula at their places."""
    num, tail = 2**31 + 4100, 4096
    x = torch.zeros(num, device="cuda", dtype=torch.bfloat16)
    x[-tail:] = torch.randn(tail, generator=torch.Generator().manual_seed(0)).cuda()
    codec = FourBitDerivative(Activation.silu, check_finite=False)
    encoded = codec.encode(x, seed=9, backend=Backend.triton)
    got = unpack_nibbles(encoded.payload[0][-tail // 2 :], tail).cpu().int()
    blocks = torch.arange((num - tail) // 4, num // 4)
    words = torch.stack(philox(blocks, 9, 0), dim=-1).flatten()
    low, step = (torch.tensor(end) for end in fixed_grid(Activation.silu))
    exact = derivative(x[-tail:].cpu().float(), Activation.silu)
    expected = to_codes(exact, low, step, FOUR_BIT_LEVELS, (words >> 8).float() * 2.0**-24).int()
    assert (got - expected).abs().max() <= 1
    assert (got != expected).sum() <= 2
    grad = codec.backward(encoded, torch.ones_like(x), backend=Backend.triton)
    assert (
        torch.equal(grad[-tail:].cpu(), (expected.float() * step + low).to(torch.bfloat16)) or (got != expected).any()
    )
