"""RMSNorm in both castings and with a residual, the plain form, against formulas written out in fp64."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.api import Backend, NormCasting, add_rms_norm, rms_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 7), (2, 5, 33), (1, 5)]
EPS = 1e-5


def normed(x: torch.Tensor, weight: torch.Tensor, casting: NormCasting) -> torch.Tensor:
    factor = 1 + weight if casting is NormCasting.gemma else weight
    return factor * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("casting", list(NormCasting))
def test_both_castings(check, draw, casting: NormCasting, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(
        "rms_norm",
        lambda x, w: rms_norm(x, w, EPS, casting=casting),
        lambda x, w: normed(x, w, casting),
        [draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("casting", list(NormCasting))
def test_residual_sum(check, draw, casting: NormCasting, dtype: torch.dtype) -> None:
    """Normed and sum side by side: the gradients are those of both cotangents at once."""

    def operator(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack(add_rms_norm(x, r, w, EPS, casting=casting))

    def oracle(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack((normed(x + r, w, casting), x + r))

    check("add_rms_norm", operator, oracle, [draw(2, 3, 33, dtype=dtype) for _ in range(2)] + [draw(33, dtype=dtype)])


def test_the_sum_is_rounded_before_it_is_normed(draw) -> None:
    x, residual, weight = (draw(*shape, dtype=torch.bfloat16) for shape in ((4, 33), (4, 33), (33,)))
    out, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, weight, EPS))


def test_where_the_castings_round(draw) -> None:
    """In bf16, bit by bit: llama rounds twice, gemma once."""
    x, weight = draw(16, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    once = (unit * (1 + weight.float())).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS), weight * unit.to(torch.bfloat16))
    assert torch.equal(rms_norm(x, weight, EPS, casting=NormCasting.gemma), once)
    assert not torch.equal(once, (1 + weight) * unit.to(torch.bfloat16))


@pytest.mark.parametrize("casting", list(NormCasting))
def test_gradcheck(draw, casting: NormCasting) -> None:
    x, residual, weight = (draw(*shape).requires_grad_() for shape in ((2, 3), (2, 3), (3,)))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, casting=casting), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, EPS, casting=casting), (x, residual, weight))


def test_bad_input_is_named(draw) -> None:
    x, weight = draw(2, 4, dtype=torch.float32), draw(4, dtype=torch.float32)
    bad = [
        (lambda: rms_norm(x, weight[:3], EPS), r"weight \(3,\): expected \(H,\) where x is \(2, 4\)"),
        (lambda: rms_norm(x, weight[None], EPS), r"weight \(1, 4\): expected"),
        (lambda: rms_norm(x, weight.double(), EPS), "weight .*float64.*: expected torch.float32"),
        (lambda: rms_norm(x, weight.to("meta"), EPS), "weight .* on meta: expected torch.float32 on cpu"),
        (lambda: rms_norm(x, weight, -1.0), "eps=-1.0: at least 0"),
        (lambda: rms_norm(x, weight, float("nan")), "eps=nan: at least 0"),
        (lambda: rms_norm(x[:, :0], weight[:0], EPS), r"x \(2, 0\): expected"),
        (lambda: rms_norm(x.sum(), weight, EPS), r"x \(\): expected"),
        (lambda: rms_norm(x, weight, EPS, backend=Backend.stock), "rms_norm: backend=stock"),
        (lambda: rms_norm(x.double(), weight.double(), EPS, backend=Backend.triton), "backend=triton"),
        (lambda: add_rms_norm(x, x[:1], weight, EPS), r"residual \(1, 4\).*: expected as x, \(2, 4\)"),
        (lambda: add_rms_norm(x, x.bfloat16(), weight, EPS), "residual .*bfloat16"),
        (lambda: add_rms_norm(x, x.to("meta"), weight, EPS), "residual .* on meta"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
