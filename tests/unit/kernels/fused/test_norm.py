"""The fused RMSNorm, with and without a residual, against fp64: short rows, rows of several tiles, several programs."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.api import Backend, NormCasting, add_rms_norm, rms_norm

pytest.importorskip("triton")
from headrace.kernels.fused import norm as fused

EPS = 1e-5
TRITON = Backend.triton


@pytest.fixture(params=["one tile", "rows wider than a tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two programs in backward; tiles of 32 numbers, or so small that a row takes three."""
    monkeypatch.setattr(fused, "MIN_PROGRAMS", 2)
    monkeypatch.setattr(fused, "MAX_PROGRAMS", 2)
    monkeypatch.setattr(fused, "SMALL_TILE", 32)
    if request.param != "one tile":
        monkeypatch.setattr(fused, "LARGE_TILE", 4)
    return request.param


def normed(x: torch.Tensor, weight: torch.Tensor, casting: NormCasting) -> torch.Tensor:
    factor = 1 + weight if casting is NormCasting.gemma else weight
    return factor * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def draw_inputs(draw, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [draw(*shape, dtype=torch.float32) for shape in shapes]


@pytest.mark.parametrize("shape", [(9, 11), (2, 3, 9), (1, 5)])
@pytest.mark.parametrize("casting", list(NormCasting))
def test_rms_norm(check, draw, tiles: str, casting: NormCasting, shape: tuple[int, ...]) -> None:
    check(
        "rms_norm",
        lambda x, w: rms_norm(x, w, EPS, casting=casting, backend=TRITON),
        lambda x, w: normed(x, w, casting),
        draw_inputs(draw, shape, shape[-1:]),
    )


@pytest.mark.parametrize("casting", list(NormCasting))
def test_residual_sum(check, draw, tiles: str, casting: NormCasting) -> None:
    """Both results side by side: the gradients are those of both cotangents at once."""

    def operator(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack(add_rms_norm(x, r, w, EPS, casting=casting, backend=TRITON))

    def oracle(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack((normed(x + r, w, casting), x + r))

    check("add_rms_norm", operator, oracle, draw_inputs(draw, (5, 11), (5, 11), (11,)))


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_of_the_residual_sum(check, draw, tiles: str, used: int) -> None:
    """The other has no cotangent; the weight of an unused norm has no gradient."""
    x, residual, weight = draw_inputs(draw, (3, 9), (3, 9), (9,))
    check(
        "add_rms_norm",
        lambda x, r: add_rms_norm(x, r, weight, EPS, backend=TRITON)[used],
        lambda x, r: (normed(x + r, weight.double(), NormCasting.llama), x + r)[used],
        [x, residual],
    )
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(
        add_rms_norm(x, residual, weight, EPS, backend=TRITON)[used].sum(), weight, allow_unused=True
    )
    assert (gradient is None) == (used == 1)


def test_real_tiles(check, draw) -> None:
    """Tile sizes as they are on a GPU: a row of three tiles, and a tile of several rows."""
    for shape in ((2, 20000), (70, 100)):
        check(
            "rms_norm",
            lambda x, w: rms_norm(x, w, EPS, backend=TRITON),
            lambda x, w: normed(x, w, NormCasting.llama),
            draw_inputs(draw, shape, shape[-1:]),
        )


def test_non_contiguous_inputs_and_cotangents(draw, tiles: str) -> None:
    """Same bits as of the contiguous copies."""
    x, weight, cotangent = draw_inputs(draw, (6, 10), (20,), (10,))
    bits = []
    for copied in (False, True):
        leaf, factor = x.clone().requires_grad_(), weight.clone().requires_grad_()
        view, scale, upstream = leaf.t(), factor[::2][:6], cotangent[:, None].expand(10, 6)
        if copied:
            view, scale, upstream = view.contiguous(), scale.contiguous(), upstream.contiguous()
        out = rms_norm(view, scale, EPS, backend=TRITON)
        bits.append([out, *torch.autograd.grad(out, (leaf, factor), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_no_rows(draw) -> None:
    x, weight = draw_inputs(draw, (0, 4), (4,))
    x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, weight, EPS, backend=TRITON)
    d_x, d_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert out.shape == d_x.shape == (0, 4)
    assert torch.equal(d_weight, torch.zeros(4))


def test_what_is_kept(draw) -> None:
    """x (or the sum, which the caller has), the weight, and one fp32 per row; nothing else."""
    x, residual, weight = (t.requires_grad_() for t in draw_inputs(draw, (3, 9), (3, 9), (9,)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS, backend=TRITON)
        _, total = add_rms_norm(x, residual, weight, EPS, backend=TRITON)
    assert [t.data_ptr() for t in (kept[0], kept[1], kept[3], kept[4])] == [
        t.data_ptr() for t in (x, weight, total, weight)
    ]
    assert [(t.numel(), t.dtype) for t in (kept[2], kept[5])] == [(3, torch.float32)] * 2
    assert len(kept) == 6


def test_backward_runs_once(draw) -> None:
    x, weight = (t.requires_grad_() for t in draw_inputs(draw, (2, 4), (4,)))
    out = rms_norm(x, weight, EPS, backend=TRITON)
    out.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()
    (d_x,) = torch.autograd.grad(rms_norm(x, weight, EPS, backend=TRITON).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_the_share_covers_every_row() -> None:
    """Programs times rows reach the last row, and the last program has one; no more programs than the bound."""
    for width in (1, 100, 2304, 8192, 20000):
        for num_rows in (1, 7, 300, 113360):
            programs, rows = fused.backward_share(num_rows, width)
            assert (programs - 1) * rows < num_rows <= programs * rows
            assert programs <= fused.MAX_PROGRAMS
            assert rows % fused.tile_shape(width)[0] == 0
            assert programs * width <= max(fused.PARTIAL_ELEMENTS, fused.MIN_PROGRAMS * width)


def lost_row(num_rows: int, width: int) -> tuple[int, int]:
    programs, rows = 1, num_rows - 1
    return programs, rows


def no_correction(unit, d_unit, correction, rstd, d_sum_ptr, offsets, mask, HAS_D_SUM):
    return d_unit * rstd


def plain_factor(weight_ptr, columns, mask, GEMMA):
    return fused.tl.load(weight_ptr + columns, mask=mask, other=0.0)


@pytest.mark.parametrize(
    ("name", "mutant", "place"),
    [("backward_share", lost_row, 2), ("_input_gradient", no_correction, 1), ("_factor", plain_factor, 0)],
)
def test_mutants_are_found(draw, monkeypatch: pytest.MonkeyPatch, name: str, mutant: object, place: int) -> None:
    """Each breaks the result it should (0 the output, 1 the gradient of x, 2 that of the weight) by far."""
    x, weight = (t.requires_grad_() for t in draw_inputs(draw, (5, 9), (9,)))

    def results() -> list[torch.Tensor]:
        out = rms_norm(x, weight, EPS, casting=NormCasting.gemma, backend=TRITON)
        return [out, *torch.autograd.grad(out.square().sum(), (x, weight))]

    right = results()[place]
    monkeypatch.setattr(fused, name, mutant)
    assert (results()[place] - right).norm() > 1e-2 * right.norm()
