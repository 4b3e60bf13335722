"""Gradients in closed form against those of autograd over the plain operators, fused ones in the interpreter too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import (
    Backend,
    NormCasting,
    qk_norm_rope,
    qk_norm_rope_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_scaled,
    rope_frequencies,
    rope_tables,
    swiglu,
    swiglu_backward,
)

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
Tensors = list[torch.Tensor]


def tables_of(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # As transformers rounds them, whatever the dtype: the oracle sees the same numbers.
    cos, sin = rope_tables(torch.arange(q.shape[1])[None], rope_frequencies(q.shape[3], 100.0), torch.bfloat16)
    return cos.to(q.dtype), sin.to(q.dtype)


def norm(casting: NormCasting, *, scaled: bool = False) -> tuple[Callable[..., Tensors], Callable[..., Tensors]]:
    def run(x: torch.Tensor, weight: torch.Tensor) -> Tensors:
        return [rms_norm(x, weight, EPS, casting=casting, backend=Backend.reference)]

    def back(grads: Tensors, x: torch.Tensor, weight: torch.Tensor, backend: Backend, trained: bool) -> Tensors:
        options = {"casting": casting, "backend": backend, "of_weight": trained}
        if scaled:
            y, options["scale"] = rms_norm_scaled(x, weight, EPS, casting=casting, backend=backend)
            assert torch.equal(y, rms_norm(x, weight, EPS, casting=casting, backend=backend))
        return list(rms_norm_backward(*grads, x, weight, EPS, **options))

    return run, back


def qk_norm() -> tuple[Callable[..., Tensors], Callable[..., Tensors]]:
    def run(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        return list(qk_norm_rope(q, k, *weights, *tables_of(q), EPS, backend=Backend.reference))

    def back(grads: Tensors, q: torch.Tensor, k: torch.Tensor, *rest: object) -> Tensors:
        *weights, backend, trained = rest
        of_heads, of_weights = qk_norm_rope_backward(
            tuple(grads), (q, k), tuple(weights), tables_of(q), EPS, backend=backend, of_weights=trained
        )
        return [*of_heads, *of_weights]

    return run, back


def glu() -> tuple[Callable[..., Tensors], Callable[..., Tensors]]:
    def back(grads: Tensors, gate: torch.Tensor, up: torch.Tensor, backend: Backend, trained: bool) -> Tensors:
        return list(swiglu_backward(*grads, gate, up, backend=backend))

    return lambda *tensors: [swiglu(*tensors, backend=Backend.reference)], back


# row of the tolerance table, operator and closed form, shapes of what is read and of the parameters
CASES = {
    "norm": ("rms_norm", norm(NormCasting.llama), [(2, 5, 33)], [(33,)]),
    "norm of rows": ("rms_norm", norm(NormCasting.llama), [(7, 8)], [(8,)]),
    "norm with its scale": ("rms_norm", norm(NormCasting.llama, scaled=True), [(2, 5, 33)], [(33,)]),
    "norm, gemma": ("rms_norm", norm(NormCasting.gemma), [(2, 5, 33)], [(33,)]),
    "qk norm": ("qk_norm_rope", qk_norm(), [(2, 6, 3, 8), (2, 6, 1, 8)], [(8,), (8,)]),
    "swiglu": ("swiglu", glu(), [(2, 3, 11), (2, 3, 11)], []),
}


def drawn(draw, case: str, dtype: torch.dtype) -> tuple[Tensors, Tensors, Tensors]:
    """What the case reads, its parameters, and the gradients of what it makes."""
    _, (run, _), reads, params = CASES[case]
    tensors, own = [draw(*shape, dtype=dtype) for shape in reads], [draw(*shape, dtype=dtype) for shape in params]
    return tensors, own, [draw(*made.shape, dtype=dtype) for made in run(*tensors, *own)]


def by_autograd(case: str, tensors: Tensors, grads: Tensors, dtype: torch.dtype) -> Tensors:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(CASES[case][1][0](*leaves), leaves, [grad.to(dtype) for grad in grads]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_autograd(draw, case: str, dtype: torch.dtype) -> None:
    """fp64: to the last bits. Narrower: within the operator's row, and no further from fp64 than autograd is."""
    row, (_, back), _, _ = CASES[case]
    tensors, params, grads = drawn(draw, case, dtype)
    found = back(grads, *tensors, *params, Backend.reference, True)
    exact = by_autograd(case, [*tensors, *params], grads, torch.float64)
    plain = by_autograd(case, [*tensors, *params], grads, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert [grad.dtype for grad in found] == [dtype] * len(tensors) + [wide] * len(params)
    for ours, right, theirs in zip(found, exact, plain, strict=True):
        assert ours.shape == right.shape
        assert rel_error(ours, right) <= (1e-15 if dtype is torch.float64 else REL_ERROR[row][dtype])
        assert rel_error(ours, right) <= 1.2 * rel_error(theirs, right) + (1e-7 if dtype is torch.float32 else 1e-15)


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_parameter_costs_nothing_and_changes_nothing(draw, case: str) -> None:
    tensors, params, grads = drawn(draw, case, torch.float32)
    back = CASES[case][1][1]
    whole, part = (back(grads, *tensors, *params, Backend.reference, trained) for trained in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(whole[: len(tensors)], part, strict=False))
    assert part[len(tensors) :] == [None] * len(params)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu runs the kernels there")
@pytest.mark.parametrize("case", CASES)
def test_the_fused_closed_form(draw, case: str) -> None:
    row, (_, back), _, _ = CASES[case]
    tensors, params, grads = drawn(draw, case, torch.float32)
    exact = by_autograd(case, [*tensors, *params], grads, torch.float64)
    for ours, right in zip(back(grads, *tensors, *params, Backend.triton, True), exact, strict=True):
        assert rel_error(ours, right) <= REL_ERROR[row][torch.float32]
