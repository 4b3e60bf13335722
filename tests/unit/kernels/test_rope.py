"""Rotary positions with the norm of every head, the plain form, against formulas written out in fp64."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.api import (
    Backend,
    NormCasting,
    apply_rope,
    qk_norm_rope,
    rms_norm,
    rope_frequencies,
    rope_tables,
)

EPS = 1e-6


def normed_and_turned(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, casting: NormCasting
) -> torch.Tensor:
    """Per pair of a head: the 2 x 2 rotation of the normed numbers, in fp64."""
    factor = 1 + weight if casting is NormCasting.gemma else weight
    x = factor * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    half = x.shape[-1] // 2
    c, s = (table[..., :half].double()[:, :, None] for table in (cos, sin))
    return torch.cat((x[..., :half] * c - x[..., half:] * s, x[..., half:] * c + x[..., :half] * s), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("casting", list(NormCasting))
def test_qk_norm_rope(check, draw, casting: NormCasting, dtype: torch.dtype) -> None:
    cos, sin = rope_tables(torch.arange(5)[None], rope_frequencies(6, 100.0), dtype)

    def operator(q: torch.Tensor, k: torch.Tensor, qw: torch.Tensor, kw: torch.Tensor) -> torch.Tensor:
        return torch.cat(qk_norm_rope(q, k, qw, kw, cos, sin, EPS, casting=casting), dim=2)

    def oracle(q: torch.Tensor, k: torch.Tensor, qw: torch.Tensor, kw: torch.Tensor) -> torch.Tensor:
        pairs = ((q, qw), (k, kw))
        return torch.cat([normed_and_turned(x, weight, cos, sin, casting) for x, weight in pairs], dim=2)

    shapes = ((2, 5, 3, 6), (2, 5, 1, 6), (6,), (6,))
    check("qk_norm_rope", operator, oracle, [draw(*shape, dtype=dtype) for shape in shapes])


def test_it_is_the_norm_and_then_the_rotation_of_today(draw) -> None:
    """Bit by bit, in bf16: what a decoder with per-head norms computes from the single operators."""
    q, k, q_weight, k_weight = (draw(*s, dtype=torch.bfloat16) for s in ((1, 4, 3, 8), (1, 4, 1, 8), (8,), (8,)))
    tables = rope_tables(torch.arange(4)[None], rope_frequencies(8, 100.0), torch.bfloat16)
    expected = apply_rope(rms_norm(q, q_weight, EPS), rms_norm(k, k_weight, EPS), *tables)
    got = qk_norm_rope(q, k, q_weight, k_weight, *tables, EPS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradcheck(draw) -> None:
    tables = rope_tables(torch.arange(2)[None], rope_frequencies(4, 100.0), torch.float64)
    q, k, q_weight, k_weight = (draw(*s).requires_grad_() for s in ((1, 2, 2, 4), (1, 2, 1, 4), (4,), (4,)))
    assert torch.autograd.gradcheck(lambda *args: apply_rope(*args, *tables), (q, k))
    for casting in NormCasting:
        assert torch.autograd.gradcheck(
            lambda *args, c=casting: qk_norm_rope(*args, *tables, EPS, casting=c), (q, k, q_weight, k_weight)
        )


def test_bad_input_is_named(draw) -> None:
    q, k, weight = (draw(*shape, dtype=torch.float32) for shape in ((2, 3, 4, 6), (2, 3, 1, 6), (6,)))
    cos, sin = rope_tables(torch.arange(3)[None], rope_frequencies(6, 100.0), torch.float32)
    bad = [
        (lambda: apply_rope(q[0], k, cos, sin), r"q \(3, 4, 6\): expected \(B, T, Hq, D\)"),
        (lambda: apply_rope(q[..., :5], k[..., :5], cos, sin), "D even"),
        (lambda: apply_rope(q, k[:1], cos, sin), r"k \(1, 3, 1, 6\): expected \(2, 3, Hkv, 6\)"),
        (lambda: apply_rope(q, k.double(), cos, sin), "k is torch.float64: expected torch.float32"),
        (lambda: apply_rope(q, k.to("meta"), cos, sin), "k is on meta: expected cpu"),
        (lambda: apply_rope(q, k, cos[:, :2], sin), r"cos \(1, 2, 6\): expected \(2 or 1, 3, 6\)"),
        (lambda: apply_rope(q, k, cos, sin[0]), r"sin \(3, 6\): expected"),
        (lambda: apply_rope(q, k, cos, sin.expand(2, -1, -1)), r"sin \(2, 3, 6\) .*: expected \(1, 3, 6\)"),
        (lambda: apply_rope(q, k, cos, sin.double()), "sin .*float64"),
        (lambda: apply_rope(q, k, cos, sin.to("meta")), "sin is on meta: expected cpu"),
        (lambda: apply_rope(q, k, cos, sin, backend=Backend.stock), "apply_rope: backend=stock"),
        (lambda: qk_norm_rope(q, k, weight[:4], weight, cos, sin, EPS), r"q_weight \(4,\): expected"),
        (lambda: qk_norm_rope(q, k, weight, weight.half(), cos, sin, EPS), "k_weight .*float16"),
        (lambda: qk_norm_rope(q, k, weight, weight, cos, sin, -1.0), "eps=-1.0: at least 0"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
