"""silu, gelu and swiglu that keep 4-bit codes: exact forward, backward from the codes and from nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import rel_error
from headrace.kernels.codecs.activations import Activation, apply, derivative, swiglu_factors
from headrace.kernels.codecs.config import Rounding, stash_bytes, swiglu_bytes
from headrace.kernels.codecs.derivative import FourBitDerivative, FourBitSwiGLU
from headrace.kernels.codecs.four_bit import FourBitPerGroup
from headrace.kernels.codecs.s2a import gelu_s2a, silu_s2a, swiglu_s2a

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_INPUT: dict[Activation, Callable[..., torch.Tensor]] = {
    Activation.silu: silu_s2a,
    Activation.gelu_erf: gelu_s2a,
    Activation.gelu_tanh: lambda x, **options: gelu_s2a(x, approximate="tanh", **options),
}
EACH = pytest.mark.parametrize("activation", list(Activation))


@EACH
def test_derivative_against_autograd_in_fp64(activation: Activation) -> None:
    x = torch.cat((torch.linspace(-15, 15, 4001, dtype=torch.float64), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])))
    x = x.requires_grad_()
    (expected,) = torch.autograd.grad(apply(x, activation).sum(), x)
    torch.testing.assert_close(derivative(x.detach(), activation), expected, rtol=1e-9, atol=1e-13)
    # 1 - sigmoid cancels: |x| times fp32's last digit, some 1e-5 of a step of the code.
    torch.testing.assert_close(derivative(x.detach().float(), activation).double(), expected, rtol=0, atol=1e-6)
    assert torch.autograd.gradcheck(lambda t: apply(t, activation), x[1990:2010].detach().requires_grad_())


@EACH
def test_derivative_at_the_ends_of_fp32(activation: Activation) -> None:
    x = torch.tensor([-3e38, -1e30, -1e20, 1e20, 1e30, 3e38])
    torch.testing.assert_close(derivative(x, activation), torch.tensor([0.0, 0, 0, 1, 1, 1]), atol=1e-30, rtol=0)


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_exact_and_backward_is_the_code_times_the_gradient(
    activation: Activation, dtype: torch.dtype, normal
) -> None:
    x, cotangent = (2 * normal(3, 7)).to(dtype).requires_grad_(), normal(3, 7).to(dtype)
    y = ONE_INPUT[activation](x, seed=5)
    assert torch.equal(y, apply(x.detach(), activation))
    (grad,) = torch.autograd.grad(y, x, cotangent)
    codec = FourBitDerivative(activation)
    decoded = codec.decode(codec.encode(x, seed=5), dtype=torch.float32)
    assert torch.equal(grad, (cotangent.float() * decoded).to(dtype))
    assert grad.dtype is dtype
    nearest = torch.autograd.grad(ONE_INPUT[activation](x, seed=5, rounding=Rounding.nearest), x, cotangent)[0]
    exact = derivative(x.detach().double(), activation)
    bound = 0.5 * 0.0839 * cotangent.double().abs() + torch.finfo(dtype).eps * cotangent.double().abs() + 1e-6
    assert ((nearest.double() - cotangent.double() * exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype, normal) -> None:
    gate, up = (normal(3, 2, 37).to(dtype).requires_grad_() for _ in range(2))
    cotangent = normal(3, 2, 37).to(dtype)
    y = swiglu_s2a(gate, up, seed=5, group_size=16)
    assert torch.equal(y, F.silu(gate.detach()) * up.detach())
    grads = torch.autograd.grad(y, (gate, up), cotangent)
    codes = FourBitSwiGLU(group_size=16).encode(gate, up, seed=5)
    for grad, code in zip(grads, codes, strict=True):
        decoded = FourBitPerGroup(group_size=16).decode(code, dtype=torch.float32)
        assert torch.equal(grad, (cotangent.float() * decoded).to(dtype))
    assert (codes[0].stream, codes[1].stream) == (0, 1)
    assert sum(code.num_bytes for code in codes) == swiglu_bytes(gate.shape, 16)
    assert FourBitSwiGLU(group_size=16).bytes_for(gate.shape, dtype) == swiglu_bytes(gate.shape, 16)


def test_factors_of_swiglu_against_autograd(normal) -> None:
    gate, up = (normal(4, 9).double().requires_grad_() for _ in range(2))
    expected = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    for got, exact in zip(swiglu_factors(gate.detach(), up.detach()), expected, strict=True):
        torch.testing.assert_close(got, exact)


def test_errors_of_the_gradients_in_bf16(normal) -> None:
    """Random inputs, groups of 128: what 4 bits cost, relative to the gradient's size."""
    gate, up = (normal(64, 256).bfloat16().requires_grad_() for _ in range(2))
    cotangent = normal(64, 256).bfloat16()
    wide = [tensor.detach().double().requires_grad_() for tensor in (gate, up)]
    exact = torch.autograd.grad(F.silu(wide[0]) * wide[1], wide, cotangent.double())
    errors = {}
    for rounding in Rounding:
        found = torch.autograd.grad(swiglu_s2a(gate, up, seed=1, rounding=rounding), (gate, up), cotangent)
        errors[rounding] = [rel_error(got, expected) for got, expected in zip(found, exact, strict=True)]
    assert all(0.1 < error < 0.25 for error in errors[Rounding.stochastic]), errors
    assert all(
        near < 0.75 * far for near, far in zip(errors[Rounding.nearest], errors[Rounding.stochastic], strict=True)
    )


def saved_by(call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


@EACH
def test_backward_keeps_half_a_byte_per_element(activation: Activation, normal) -> None:
    x = normal(5, 9).requires_grad_()
    saved = saved_by(lambda: ONE_INPUT[activation](x, seed=5))
    assert [tensor.dtype for tensor in saved] == [torch.uint8]
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == stash_bytes(activation.codec, (5, 9))


def test_swiglu_keeps_its_codes_and_ranges_alone(normal) -> None:
    gate, up = normal(5, 300).requires_grad_(), normal(5, 300).requires_grad_()
    saved = saved_by(lambda: swiglu_s2a(gate, up, seed=5))
    assert [tensor.dtype for tensor in saved] == [torch.uint8, torch.float32] * 2
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) == swiglu_bytes((5, 300))


def test_a_stash_that_went_away_and_came_back(normal) -> None:
    """Hooks replace what was saved by its bytes; backward reads the copy."""
    gate, up = normal(3, 20).requires_grad_(), normal(3, 20).requires_grad_()
    plain = torch.autograd.grad(swiglu_s2a(gate, up, seed=5).sum(), (gate, up))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        y = swiglu_s2a(gate, up, seed=5)
    for got, expected in zip(torch.autograd.grad(y.sum(), (gate, up)), plain, strict=True):
        assert torch.equal(got, expected)


def test_calls_in_flight_do_not_mix(normal) -> None:
    """Two forwards before the first backward, as in a pipeline: each backward has its own codes."""
    first, second = normal(3, 20).requires_grad_(), (9 * normal(3, 20)).requires_grad_()
    alone = [torch.autograd.grad(silu_s2a(x, seed=s).sum(), x)[0] for s, x in enumerate((first, second))]
    both = [silu_s2a(x, seed=s) for s, x in enumerate((first, second))]
    for place in (0, 1):
        got = torch.autograd.grad(both[place].sum(), (first, second)[place])[0]
        assert torch.equal(got, alone[place])


def test_second_backward_and_double_backward_are_refused(normal) -> None:
    gate, up = normal(3, 20).requires_grad_(), normal(3, 20).requires_grad_()
    for y in (silu_s2a(gate, seed=1), swiglu_s2a(gate, up, seed=1)):
        y.sum().backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
    (grad,) = torch.autograd.grad(silu_s2a(gate, seed=1).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nothing_is_encoded_where_no_gradient_is_asked_for(normal) -> None:
    x = normal(3, 20)
    assert silu_s2a(x, seed=1).grad_fn is None
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        assert swiglu_s2a(leaf, leaf, seed=1).grad_fn is None
    up = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(swiglu_s2a(x, up, seed=1).sum(), up)
    both = torch.autograd.grad(swiglu_s2a(leaf, up, seed=1).sum(), (leaf, up))
    assert torch.equal(got, both[1])


def test_layouts_and_sizes(normal) -> None:
    x = normal(4, 6).requires_grad_()
    strided = x.t()
    (got,) = torch.autograd.grad(silu_s2a(strided, seed=1), x, torch.ones(()).expand(6, 4))
    (expected,) = torch.autograd.grad(silu_s2a(strided.contiguous(), seed=1), x, torch.ones(6, 4))
    assert torch.equal(got, expected)
    for shape in ((0, 4), (1,), (3, 0)):
        gate, up = torch.ones(shape, requires_grad=True), torch.ones(shape, requires_grad=True)
        swiglu_s2a(gate, up, seed=1).sum().backward()
        gelu_s2a(up, seed=1).sum().backward()
        assert gate.grad is not None
        assert gate.grad.shape == shape


def test_bad_input(normal) -> None:
    x, up = normal(3, 20).requires_grad_(), normal(3, 20)
    with pytest.raises(ValueError, match=r"up: shape \(3, 19\), gate has \(3, 20\)"):
        swiglu_s2a(x, up[:, :19], seed=1)
    with pytest.raises(ValueError, match="up: dtype"):
        swiglu_s2a(x, up.bfloat16(), seed=1)
    with pytest.raises(ValueError, match="up: device meta"):
        swiglu_s2a(x, up.to("meta"), seed=1)
    with pytest.raises(ValueError, match="approximate='sigmoid'"):
        gelu_s2a(x, seed=1, approximate="sigmoid")
    with pytest.raises(ValueError, match="group_size=100"):
        swiglu_s2a(x, up, seed=1, group_size=100)
    with pytest.raises(ValueError, match="seed=-1"):
        silu_s2a(up, seed=-1)
    with pytest.raises(ValueError, match="x: dtype"):
        silu_s2a(x.double(), seed=1)
    with pytest.raises(ValueError, match="stream="):
        FourBitSwiGLU().encode(x, up, seed=1, stream=2**32 - 1)
    up[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        swiglu_s2a(x, up, seed=1)
    with pytest.raises(ValueError, match="NaN"):
        silu_s2a(up.requires_grad_(), seed=1)
    codec = FourBitDerivative(Activation.silu)
    with pytest.raises(ValueError, match=r"grad: shape \(3, 19\)"):
        codec.backward(codec.encode(x, seed=1), torch.ones(3, 19))
    with pytest.raises(ValueError, match="grad: dtype"):
        codec.backward(codec.encode(x, seed=1), torch.ones(3, 20, dtype=torch.float64))
