"""RMSNorm, SwiGLU and rotary positions against formulas written out in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import apply_rope, rms_norm, rope_frequencies, rope_tables, swiglu
from headrace.kernels.rope_scaling import RopeScaling

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 33), (1, 4, 2)])
def test_rms_norm(check, draw, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def oracle(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    check(
        "rms_norm", lambda x, w: rms_norm(x, w, 1e-5), oracle, [draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)]
    )


def test_rms_norm_of_fp64_is_not_taken_in_fp32(draw) -> None:
    x, weight = draw(4, 9), torch.ones(9, dtype=torch.float64)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert rel_error(rms_norm(x, weight, 1e-6), exact) < 1e-15
    mutant = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).double()
    assert rel_error(mutant, exact) > 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(check, draw, dtype: torch.dtype) -> None:
    check("swiglu", swiglu, lambda g, u: g * torch.sigmoid(g) * u, [draw(3, 11, dtype=dtype), draw(3, 11, dtype=dtype)])


def complex_rotation(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """(x_i + i x_{i + D/2}) e^{i p f}: the rotation by complex numbers, in fp64."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[..., None].double() * frequencies)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, :, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_against_complex_numbers(check, draw, dtype: torch.dtype) -> None:
    # Few tokens, and frequencies that fp32 holds exactly (theta = 4^4): the fp32 tables are then good to 1e-7.
    positions = torch.arange(6)[None]
    cos, sin = rope_tables(positions, rope_frequencies(8, 256.0), dtype)
    assert rel_error(cos, torch.cat([(positions[..., None] * 256.0 ** (-torch.arange(4) / 4)).cos()] * 2, -1)) < 4e-3
    q, k = draw(2, 6, 3, 8, dtype=dtype), draw(2, 6, 1, 8, dtype=dtype)

    def written_out(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :4], x[..., 4:]
        c, s = c[:, :, None].double(), s[:, :, None].double()
        return torch.cat((first * c[..., :4] - second * s[..., :4], second * c[..., 4:] + first * s[..., 4:]), dim=-1)

    for place in (0, 1):
        check(
            "apply_rope",
            lambda a, b, i=place: apply_rope(a, b, cos, sin)[i] + 0 * apply_rope(a, b, cos, sin)[1 - i].sum(),
            lambda a, b, i=place: written_out((a, b)[i], cos, sin) + 0 * (a.sum() + b.sum()),
            [q, k],
        )
    exact = complex_rotation(q.double(), positions, 256.0)
    assert rel_error(apply_rope(q, k, cos, sin)[0], exact) < {torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    assert rel_error(apply_rope(q, k, cos, sin)[0], complex_rotation(q.double(), positions, 10000.0)) > 5e-2


def test_llama3_scaling_has_three_regions() -> None:
    """Short wavelengths stay, long ones are divided, and those between lie between (closed form at the borders)."""
    scaling = RopeScaling(factor=8.0, original_max_position=8192)
    plain, scaled = rope_frequencies(128, 500000.0), rope_frequencies(128, 500000.0, scaling)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.any()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    mix = (8192 / wavelengths[between] - 1) / 3
    torch.testing.assert_close(scaled[between], plain[between] * (mix + (1 - mix) / 8))


def test_tables_have_the_same_bits_in_every_dtype() -> None:
    positions, frequencies = torch.arange(1000)[None], rope_frequencies(64, 10000.0)
    narrow, wide = (rope_tables(positions, frequencies, dtype) for dtype in (torch.float32, torch.float64))
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a.double(), b)
