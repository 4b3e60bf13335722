"""The fused gated linear units against fp64: rows of several tiles, views of a joint projection, far tails."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.kernels.api import Backend, geglu, swiglu

pytest.importorskip("triton")
from headrace.kernels.fused import activation as fused

TRITON = Backend.triton
OPERATORS = {
    "swiglu": swiglu,
    "geglu tanh": geglu,
    "geglu none": lambda g, u, backend: geglu(g, u, approximate="none", backend=backend),
}
ORACLES = {
    "swiglu": lambda g, u: g * u / (1 + torch.exp(-g)),
    "geglu tanh": lambda g, u: g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) / 2 * u,
    "geglu none": lambda g, u: g * torch.special.erfc(-g / math.sqrt(2)) / 2 * u,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles in a row of 33."""
    monkeypatch.setattr(fused, "BLOCK", 16)


@pytest.mark.parametrize("shape", [(2, 2, 33), (3, 7), (1,)])
@pytest.mark.parametrize("name", OPERATORS)
def test_against_fp64(check, draw, name: str, shape: tuple[int, ...]) -> None:
    inputs = [draw(*shape, dtype=torch.float32) * 2, draw(*shape, dtype=torch.float32)]
    check(name.split()[0], lambda g, u: OPERATORS[name](g, u, backend=TRITON), ORACLES[name], inputs)


# At -100 the interpreter's exp is infinite, and the sigmoid rightly 0.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", OPERATORS)
def test_every_number_of_a_wide_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only in the norm: the activation and its slope to 1e-6 of their size anywhere, and no NaN far out."""
    monkeypatch.setattr(fused, "BLOCK", 1024)
    gate = torch.cat((torch.linspace(-12, 12, 4801), torch.tensor([-1e4, -100.0, 100.0, 1e4]))).requires_grad_()
    exact = gate.detach().double().requires_grad_()
    one = torch.ones(gate.shape)
    got, expected = OPERATORS[name](gate, one, backend=TRITON), ORACLES[name](exact, one.double())
    slopes = [torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in ((got, gate), (expected, exact))]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    # Of the formulas' own slope at -1e4, exp(1e4) is infinite in fp64 too.
    near = exact.abs() < 200
    torch.testing.assert_close(slopes[0].double()[near], slopes[1][near], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(slopes[0]).all()
    torch.testing.assert_close(slopes[0][-4:], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_views(draw) -> None:
    """Halves of a joint projection (a row stride) and transposed inputs: same bits as of contiguous copies."""
    joint, tall = draw(2, 3, 34, dtype=torch.float32), draw(2, 8, 3, dtype=torch.float32)
    for halves in (joint.split(17, dim=2), tall.transpose(1, 2).split(4, dim=2), joint[:, ::2].split(17, dim=2)):
        bits = []
        for copied in (False, True):
            gate, up = (t.detach().contiguous() if copied else t.detach() for t in halves)
            gate.requires_grad_(), up.requires_grad_()
            out = swiglu(gate, up, backend=TRITON)
            upstream = gate.detach().transpose(0, 1).contiguous().transpose(0, 1)
            bits.append([out, *torch.autograd.grad(out, (gate, up), upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_a_row_stride_is_read_in_place(draw) -> None:
    gate, up = draw(4, 3, 66, dtype=torch.float32).split(33, dim=2)
    assert fused._rows(up).data_ptr() == up.data_ptr()
    assert fused._rows(up).stride() == (66, 1)
    assert fused._rows(gate.transpose(1, 2)).stride() == (3, 1)


def test_what_is_kept(draw) -> None:
    """gate and up, nothing else."""
    gate, up = (draw(3, 9, dtype=torch.float32).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up, backend=TRITON)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]


def test_backward_runs_once(draw) -> None:
    gate, up = (draw(2, 3, dtype=torch.float32).requires_grad_() for _ in range(2))
    loss = geglu(gate, up, backend=TRITON).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_nothing(shape: tuple[int, ...]) -> None:
    gate, up = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    out = swiglu(gate, up, backend=TRITON)
    assert [t.shape for t in (out, *torch.autograd.grad(out.sum(), (gate, up)))] == [torch.Size(shape)] * 3


def without_the_slope(gate, ACTIVATION):
    share = fused._sigmoid(gate)
    return gate * share, share


def one_tile(width, BLOCK):
    row, columns = place(width, BLOCK)
    return row, columns % BLOCK


place = fused._place


@pytest.mark.parametrize(("name", "mutant"), [("_activation", without_the_slope), ("_place", one_tile)])
def test_mutants_are_found(draw, monkeypatch: pytest.MonkeyPatch, name: str, mutant: object) -> None:
    gate, up = (draw(2, 33, dtype=torch.float32).requires_grad_() for _ in range(2))

    def slope() -> torch.Tensor:
        return torch.autograd.grad(swiglu(gate, up, backend=TRITON).sum(), gate)[0]

    right = slope()
    monkeypatch.setattr(fused, name, mutant)
    error = (slope() - right).norm()
    assert not error < 1e-2 * right.norm()
