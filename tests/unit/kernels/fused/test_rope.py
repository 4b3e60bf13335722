"""The fused rotation of q and k, with and without the norm of every head, against fp64: odd heads, tiles, views."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from headrace.kernels.api import Backend, NormCasting, apply_rope, qk_norm_rope, rope_frequencies, rope_tables

pytest.importorskip("triton")
from headrace.kernels.fused import qk_norm
from headrace.kernels.fused import rope as fused

EPS = 1e-6
TRITON = Backend.triton
# rows, tokens, heads of q, heads of k, head size: heads and halves that no power of two fits, one of everything.
SHAPES = [(2, 2, 5, 1, 6), (1, 3, 3, 2, 10), (1, 1, 1, 1, 2)]


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads per tile at head size 6, and two programs in the backward kernel that sums."""
    monkeypatch.setattr(fused, "TILE", 8)
    monkeypatch.setattr(qk_norm, "PROGRAMS", 2)


def make_tables(batch_size: int, num_tokens: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of other positions in every row where batch_size is above 1."""
    positions = torch.arange(num_tokens)[None] + 7 * torch.arange(batch_size)[:, None]
    return rope_tables(positions, rope_frequencies(head_size, 100.0), torch.float32)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Per pair of a head the 2 x 2 rotation, in fp64."""
    half = x.shape[-1] // 2
    c, s = (table[..., :half].double()[:, :, None] for table in (cos, sin))
    return torch.cat((x[..., :half] * c - x[..., half:] * s, x[..., half:] * c + x[..., :half] * s), dim=-1)


def normed(x: torch.Tensor, weight: torch.Tensor, casting: NormCasting) -> torch.Tensor:
    factor = 1 + weight if casting is NormCasting.gemma else weight
    return factor * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def draw_qk(draw, shape: tuple[int, ...]) -> list[torch.Tensor]:
    rows, tokens, q_heads, k_heads, size = shape
    return [draw(rows, tokens, heads, size, dtype=torch.float32) for heads in (q_heads, k_heads)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table_rows", ["shared", "per row"])
def test_apply_rope(check, draw, shape: tuple[int, ...], table_rows: str) -> None:
    tables = make_tables(shape[0] if table_rows == "per row" else 1, shape[1], shape[4])
    check(
        "apply_rope",
        lambda q, k: torch.cat(apply_rope(q, k, *tables, backend=TRITON), dim=2),
        lambda q, k: torch.cat((turned(q, *tables), turned(k, *tables)), dim=2),
        draw_qk(draw, shape),
    )


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("casting", list(NormCasting))
def test_qk_norm_rope(check, draw, casting: NormCasting, shape: tuple[int, ...]) -> None:
    tables = make_tables(shape[0], shape[1], shape[4])

    def operator(q: torch.Tensor, k: torch.Tensor, qw: torch.Tensor, kw: torch.Tensor) -> torch.Tensor:
        return torch.cat(qk_norm_rope(q, k, qw, kw, *tables, EPS, casting=casting, backend=TRITON), dim=2)

    def oracle(q: torch.Tensor, k: torch.Tensor, qw: torch.Tensor, kw: torch.Tensor) -> torch.Tensor:
        pairs = ((q, qw), (k, kw))
        return torch.cat([turned(normed(x, weight, casting), *tables) for x, weight in pairs], dim=2)

    weights = [draw(shape[4], dtype=torch.float32) for _ in range(2)]
    check("qk_norm_rope", operator, oracle, [*draw_qk(draw, shape), *weights])


def test_tables_whose_halves_differ(check, draw) -> None:
    """Nothing else gives such tables, but the operator is defined for them, and its transpose too."""
    q, k = draw_qk(draw, (1, 2, 2, 1, 6))
    cos, sin = (draw(1, 2, 6, dtype=torch.float32) for _ in range(2))
    check(
        "apply_rope",
        lambda q, k: torch.cat(apply_rope(q, k, cos, sin, backend=TRITON), dim=2),
        lambda q, k: torch.cat(apply_rope(q, k, cos.double(), sin.double(), backend=Backend.reference), dim=2),
        [q, k],
    )


@contextmanager
def keeping() -> Iterator[list[torch.Tensor]]:
    """What autograd keeps meanwhile."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


@pytest.mark.parametrize("op", ["apply_rope", "qk_norm_rope"])
def test_views_of_a_joint_projection(draw, op: str) -> None:
    """Read through strides, with transposed cotangents: same bits as of contiguous copies, and nothing is copied."""
    rows, tokens, size = 2, 2, 6
    joint, upstream = (
        draw(rows, tokens, 5 * size, dtype=torch.float32),
        draw(rows, 3, tokens, size, dtype=torch.float32),
    )
    weights = [draw(size, dtype=torch.float32).requires_grad_() for _ in range(2)] if op == "qk_norm_rope" else []
    tables = [table.expand(rows, -1, -1) for table in make_tables(1, tokens, size)]
    bits = []
    for copied in (False, True):
        leaf = joint.clone().requires_grad_()
        q, k, _ = leaf.view(rows, tokens, 5, size).split((3, 1, 1), dim=2)
        cotangents = [upstream.transpose(1, 2), upstream[:, :1].transpose(1, 2)]
        if copied:
            q, k, cotangents = q.contiguous(), k.contiguous(), [c.contiguous() for c in cotangents]
        with keeping() as kept:
            if weights:
                outs = qk_norm_rope(q, k, *weights, *tables, EPS, backend=TRITON)
            else:
                outs = apply_rope(q, k, *tables, backend=TRITON)
        assert len(kept) == (8 if weights else 2)
        assert {t.data_ptr() for t in tables} <= {t.data_ptr() for t in kept}
        assert not weights or [t.data_ptr() for t in kept[:2]] == [q.data_ptr(), k.data_ptr()]
        bits.append([*outs, *torch.autograd.grad(outs, (leaf, *weights), cotangents)])
    assert all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def test_dimensions_that_are_not_dense(draw) -> None:
    q, k = draw_qk(draw, (1, 2, 3, 2, 6))
    cos, sin = make_tables(1, 2, 6)
    expected = apply_rope(q, k, cos, sin, backend=TRITON)
    scattered = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, cos, sin)]
    assert all(t.stride(-1) != 1 for t in scattered)
    assert all(torch.equal(a, b) for a, b in zip(apply_rope(*scattered, backend=TRITON), expected, strict=True))
    mixed = apply_rope(q, k, cos, scattered[3], backend=TRITON)
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))


def test_one_of_the_two_is_used(check, draw) -> None:
    """The other's gradient is zero."""
    q, k = draw_qk(draw, (1, 2, 2, 1, 6))
    tables, weights = make_tables(1, 2, 6), [torch.ones(6)] * 2
    check(
        "apply_rope",
        lambda q, k: apply_rope(q, k, *tables, backend=TRITON)[1],
        lambda q, k: turned(k, *tables) + 0 * q.sum(),
        [q, k],
    )
    check(
        "qk_norm_rope",
        lambda q, k: qk_norm_rope(q, k, *weights, *tables, EPS, backend=TRITON)[0],
        lambda q, k: turned(normed(q, weights[0].double(), NormCasting.llama), *tables) + 0 * k.sum(),
        [q, k],
    )


def test_what_the_fused_form_refuses(draw) -> None:
    q, k = draw_qk(draw, (1, 2, 2, 1, 6))
    cos, sin = make_tables(1, 2, 6)
    with pytest.raises(ValueError, match=r"apply_rope: cos is torch\.float64: expected torch\.float32, as q"):
        apply_rope(q, k, cos.double(), sin.double(), backend=TRITON)
    weight = torch.ones(6)
    with pytest.raises(ValueError, match="qk_norm_rope: sin requires a gradient"):
        qk_norm_rope(q, k, weight, weight, cos, sin.clone().requires_grad_(), EPS, backend=TRITON)


def test_backward_runs_once(draw) -> None:
    q, k = (t.requires_grad_() for t in draw_qk(draw, (1, 2, 1, 1, 4)))
    tables, weight = make_tables(1, 2, 4), torch.ones(4)
    for outs in (
        apply_rope(q, k, *tables, backend=TRITON),
        qk_norm_rope(q, k, weight, weight, *tables, EPS, backend=TRITON),
    ):
        loss = outs[0].sum() + outs[1].sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_no_tokens(draw) -> None:
    q, k = (t.requires_grad_() for t in draw_qk(draw, (2, 0, 3, 1, 4)))
    weight = torch.ones(4, requires_grad=True)
    outs = qk_norm_rope(q, k, weight, torch.ones(4), *make_tables(1, 0, 4), EPS, backend=TRITON)
    d_q, d_weight = torch.autograd.grad(outs[0].sum() + outs[1].sum(), (q, weight))
    assert outs[0].shape == d_q.shape == q.shape
    assert torch.equal(d_weight, torch.zeros(4))


def forward_turn(q, k, tables, *, backward):
    return rotated(q, k, tables, backward=False)


rotated = fused._rotated


def no_one_added(weight_ptr, columns, GEMMA, HALF):
    return fused.load_halves(weight_ptr, columns, columns < HALF, HALF)


@pytest.mark.parametrize(
    ("module", "name", "mutant", "place"),
    [(fused, "_rotated", forward_turn, 1), (qk_norm, "_factors", no_one_added, 0)],
)
def test_mutants_are_found(
    draw, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, mutant: object, place: int
) -> None:
    """Each breaks the result it should (0 the outputs, 1 the gradients) by far."""
    q, k = (t.requires_grad_() for t in draw_qk(draw, (1, 2, 2, 1, 6)))
    tables, weight = make_tables(1, 2, 6), draw(6, dtype=torch.float32)

    def results() -> torch.Tensor:
        if name == "_factors":
            outs = qk_norm_rope(q, k, weight, weight, *tables, EPS, casting=NormCasting.gemma, backend=TRITON)
        else:
            outs = apply_rope(q, k, *tables, backend=TRITON)
        return (outs, torch.autograd.grad(outs, (q, k), (q.detach(), k.detach())))[place][0]

    right = results()
    monkeypatch.setattr(module, name, mutant)
    assert (results() - right).norm() > 1e-2 * right.norm()
