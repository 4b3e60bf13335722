"""SwiGLU and GeGLU, the plain form, against formulas written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import Backend, geglu, swiglu

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gelu(gate: torch.Tensor, approximate: str) -> torch.Tensor:
    if approximate == "none":
        return gate * torch.special.erfc(-gate / math.sqrt(2)) / 2
    return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_geglu(check, draw, approximate: str, dtype: torch.dtype) -> None:
    check(
        "geglu",
        lambda g, u: geglu(g, u, approximate=approximate),
        lambda g, u: gelu(g, approximate) * u,
        [draw(3, 11, dtype=dtype) * 3, draw(3, 11, dtype=dtype)],
    )


def test_the_two_gelus_differ(draw) -> None:
    """A table wide enough to take one for the other would test nothing."""
    gate, up = draw(200), draw(200)
    assert rel_error(geglu(gate, up), geglu(gate, up, approximate="none")) > 1e-5
    assert rel_error(geglu(gate, up), swiglu(gate, up)) > 1e-2


def test_gradcheck(draw) -> None:
    gate, up = draw(2, 3).requires_grad_(), draw(2, 3).requires_grad_()
    for operator in (swiglu, geglu, lambda g, u: geglu(g, u, approximate="none")):
        assert torch.autograd.gradcheck(operator, (gate, up))


def test_bad_input_is_named(draw) -> None:
    gate = draw(2, 4, dtype=torch.float32)
    bad = [
        (lambda: swiglu(gate, gate[:1]), r"swiglu: up \(1, 4\).*: expected \(2, 4\)"),
        (lambda: geglu(gate, gate.double()), "geglu: up .*float64.*: expected .*float32"),
        (lambda: swiglu(gate, gate.to("meta")), "up .* on meta: expected .* on cpu"),
        (lambda: geglu(gate, gate, approximate="erf"), "approximate='erf': one of tanh, none"),
        (lambda: swiglu(gate, gate, backend=Backend.stock), "swiglu: backend=stock"),
        (lambda: geglu(gate.half(), gate.half(), backend=Backend.triton), "geglu: backend=triton"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
