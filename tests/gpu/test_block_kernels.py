"""The fused norm, rotation and activation kernels on CUDA: against fp64 on the CPU, repeated, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import (
    Backend,
    NormCasting,
    add_rms_norm,
    apply_rope,
    geglu,
    qk_norm_rope,
    rms_norm,
    rope_frequencies,
    rope_tables,
    swiglu,
)

pytestmark = pytest.mark.gpu
EPS = 1e-6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Operator = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def with_eps(operator: Operator, *tensors: torch.Tensor, **options: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return operator(*tensors, EPS, **options)


def with_tables(operator: Operator, positions: int, *tensors: torch.Tensor, backend: Backend, **options: object):
    """cos and sin of `positions` rows of tokens, in bf16 whatever the dtype: the oracle sees the same numbers."""
    q, weights = tensors[0], tensors[2:]
    places = torch.arange(q.shape[1])[None] + 1000 * torch.arange(positions)[:, None]
    tables = [t.to(q.device, q.dtype) for t in rope_tables(places, rope_frequencies(q.shape[3], 1e4), torch.bfloat16)]
    extra = [EPS] if weights else []
    return operator(*tensors[:2], *weights, *tables, *extra, backend=backend, **options)


GEMMA = {"casting": NormCasting.gemma}
HEADS = [(2, 77, 32, 128), (2, 77, 8, 128)]
ODD_HEADS = [(3, 50, 5, 80), (3, 50, 1, 80)]
# case -> row of the tolerance table, operator, shapes of the tensors it takes a gradient of
CASES: dict[str, tuple[str, Operator, list[tuple[int, ...]]]] = {
    "norm of short rows": ("rms_norm", partial(with_eps, rms_norm), [(7001, 100), (100,)]),
    "norm": ("rms_norm", partial(with_eps, rms_norm), [(2, 300, 4096), (4096,)]),
    "norm, gemma": ("rms_norm", partial(with_eps, rms_norm, **GEMMA), [(600, 2304), (2304,)]),
    "norm of one full tile": ("rms_norm", partial(with_eps, rms_norm), [(300, 8192), (8192,)]),
    "norm of wide rows": ("rms_norm", partial(with_eps, rms_norm), [(600, 20000), (20000,)]),
    "residual": ("add_rms_norm", partial(with_eps, add_rms_norm), [(700, 3584), (700, 3584), (3584,)]),
    "residual, gemma": ("add_rms_norm", partial(with_eps, add_rms_norm, **GEMMA), [(9, 9000), (9, 9000), (9000,)]),
    "rope": ("apply_rope", partial(with_tables, apply_rope, 1), HEADS),
    "rope, positions per row": ("apply_rope", partial(with_tables, apply_rope, 3), ODD_HEADS),
    "qk norm": ("qk_norm_rope", partial(with_tables, qk_norm_rope, 2), [*HEADS, (128,), (128,)]),
    "qk norm, gemma": ("qk_norm_rope", partial(with_tables, qk_norm_rope, 1, **GEMMA), [*ODD_HEADS, (80,), (80,)]),
    "one token": ("qk_norm_rope", partial(with_tables, qk_norm_rope, 1), [(1, 1, 1, 64), (1, 1, 1, 64), (64,), (64,)]),
    "swiglu": ("swiglu", swiglu, [(3, 41, 5000)] * 2),
    "swiglu of one row": ("swiglu", swiglu, [(1, 1)] * 2),
    "geglu": ("geglu", geglu, [(100, 9216)] * 2),
    "geglu, error function": ("geglu", partial(geglu, approximate="none"), [(100, 9217)] * 2),
}


def draw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def results(
    operator: Operator, tensors: list[torch.Tensor], cotangents: list[torch.Tensor], backend: Backend
) -> list[torch.Tensor]:
    """Outputs and gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = operator(*leaves, backend=backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    upstream = [t.to(leaves[0].device, leaves[0].dtype) for t in cotangents]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]


def cotangents_of(row: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """As many as the operator has results, each of the shape of the input in its place."""
    count = 2 if row in ("add_rms_norm", "apply_rope", "qk_norm_rope") else 1
    return [t.flip(0) for t in draw(shapes[:count], dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_the_reference(case: str, dtype: torch.dtype) -> None:
    """Each output and each gradient: at most the reference's error in this dtype and the table's row."""
    row, operator, shapes = CASES[case]
    tensors, cotangents = draw(shapes, dtype), cotangents_of(row, shapes, dtype)
    oracle = results(operator, [t.double() for t in tensors], cotangents, Backend.reference)
    on_gpu = [t.cuda() for t in tensors]
    plain = results(operator, on_gpu, cotangents, Backend.reference)
    fused = results(operator, on_gpu, cotangents, Backend.triton)
    for got, reference, exact in zip(fused, plain, oracle, strict=True):
        assert got.dtype is dtype
        assert rel_error(got.cpu(), exact) <= rel_error(reference.cpu(), exact) + REL_ERROR[row][dtype]


@pytest.mark.parametrize("case", CASES)
def test_bits_repeat(case: str) -> None:
    row, operator, shapes = CASES[case]
    tensors = [t.cuda() for t in draw(shapes, torch.bfloat16)]
    cotangents = cotangents_of(row, shapes, torch.bfloat16)
    first = results(operator, tensors, cotangents, Backend.triton)
    for _ in range(5):
        again = results(operator, tensors, cotangents, Backend.triton)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_views_of_joint_projections() -> None:
    """Same bits as of contiguous copies, at strides that 16 does not divide."""
    (joint,) = (t.cuda() for t in draw([(2, 33, 7 * 33 + 1)], torch.bfloat16))
    gate, up = joint[..., 1:100], joint[..., 101:200]
    assert torch.equal(
        swiglu(gate, up, backend=Backend.triton),
        swiglu(gate.contiguous(), up.contiguous(), backend=Backend.triton),
    )
    q, k = (joint[..., begin : begin + 96].unflatten(-1, (-1, 32)) for begin in (1, 101))
    cos, sin = (t.cuda() for t in rope_tables(torch.arange(33)[None], rope_frequencies(32, 1e4), torch.bfloat16))
    pairs = zip(
        apply_rope(q, k, cos, sin, backend=Backend.triton),
        apply_rope(q.contiguous(), k.contiguous(), cos, sin, backend=Backend.triton),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


# case -> operator, shapes of more than 2^31 elements, and how many of the tensors are rows
HUGE: dict[str, tuple[Operator, list[tuple[int, ...]], int]] = {
    "rms_norm": (partial(with_eps, rms_norm), [(270000, 8192), (8192,)], 1),
    "rms_norm, wide": (partial(with_eps, rms_norm), [(110000, 20000), (20000,)], 1),
    "swiglu": (swiglu, [(113360, 18944)] * 2, 2),
}


@pytest.mark.parametrize("case", HUGE)
def test_beyond_two_to_the_31(case: str) -> None:
    """The last rows have the bits that they have on their own, forward and backward."""
    operator, shapes, num_rows = HUGE[case]
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for shape in shapes]
    out, *grads = results(operator, tensors, tensors[:1], Backend.triton)
    tails = [t[-5:] if place < num_rows else t for place, t in enumerate(tensors)]
    tail_out, *tail_grads = results(operator, tails, tails[:1], Backend.triton)
    assert torch.equal(out[-5:], tail_out)
    assert all(torch.equal(a[-5:], b) for a, b in zip(grads[:num_rows], tail_grads[:num_rows], strict=True))


def test_rotation_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    q = torch.randn(1, 140000, 128, 128, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(128, dtype=torch.bfloat16, device="cuda")
    tables = rope_tables(torch.arange(140000, device="cuda")[None], rope_frequencies(128, 1e4).cuda(), torch.bfloat16)
    tail, tail_tables = q[:, -5:], [t[:, -5:] for t in tables]
    for operator, weights in ((apply_rope, []), (partial(qk_norm_rope, eps=EPS), [weight, weight])):
        leaf, tail_leaf = q.detach().requires_grad_(), tail.detach().requires_grad_()
        out = operator(leaf, q[:, :, :1], *weights, *tables, backend=Backend.triton)[0]
        tail_out = operator(tail_leaf, tail[:, :, :1], *weights, *tail_tables, backend=Backend.triton)[0]
        assert torch.equal(out[:, -5:], tail_out)
        (grad,) = torch.autograd.grad(out, leaf, q)
        (tail_grad,) = torch.autograd.grad(tail_out, tail_leaf, tail)
        assert torch.equal(grad[:, -5:], tail_grad)
