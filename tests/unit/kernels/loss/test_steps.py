"""The two elementwise steps on one block, against autograd through the same formula on the whole row."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.loss.steps import RowScales, block_gradient_, block_stats

NUM_ROWS, VOCAB = 9, 31
# Odd blocks, an empty one, and the whole.
CUTS = [(0, 31), (0, 7), (7, 24), (12, 12), (30, 31)]


@pytest.fixture
def labels() -> torch.Tensor:
    """On both sides of every cut; two ignored, one of them with an LSE that counts."""
    return torch.tensor([0, 6, 7, 23, 24, 30, -1, 12, -1])


@pytest.mark.parametrize(("first", "last"), CUTS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_block_against_autograd(draw, labels, first, last, softcap, weighted) -> None:
    raw, bias = (2 * draw(NUM_ROWS, VOCAB)).requires_grad_(), draw(VOCAB)
    class_weight = draw(VOCAB).abs() if weighted else torch.ones(VOCAB, dtype=torch.float64)
    softmax, label, smooth = (draw(NUM_ROWS) for _ in range(3))
    label, smooth = (torch.where(labels >= 0, scale, 0.0) for scale in (label, smooth))
    softmax[6] = 0.0
    capped = raw + bias if softcap is None else softcap * torch.tanh((raw + bias) / softcap)
    lse = capped.logsumexp(-1)
    picked = capped.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    value = softmax * lse - label * picked - smooth * (capped * class_weight).sum(-1)
    expected = torch.autograd.grad(value.sum(), raw)[0][:, first:last]

    block = raw.detach()[:, first:last].contiguous()
    options = {"first": first, "softcap": softcap, "class_weight": class_weight[first:last] if weighted else None}
    stats = block_stats(block, labels, bias[first:last], want_total=True, **options)
    inside = (labels >= first) & (labels < last)
    assert rel_error(block, capped[:, first:last]) < 1e-15
    assert rel_error(stats.picked, torch.where(inside, picked, 0.0)) < 1e-15
    assert rel_error(stats.total, (capped * class_weight)[:, first:last].sum(-1)) < 1e-14
    if last > first:
        assert rel_error(stats.max + stats.sum_exp.log(), capped[:, first:last].logsumexp(-1)) < 1e-15
    else:
        assert stats.max.isneginf().all()
        assert not stats.sum_exp.any()
    assert block_gradient_(block, labels, lse.detach(), RowScales(softmax, label, smooth), **options) is None
    assert rel_error(block, expected) < 1e-13
    assert not block[6].any()


def test_no_total_unless_it_is_asked_for(draw, labels) -> None:
    assert block_stats(draw(NUM_ROWS, 5), labels, None, first=0, softcap=None).total is None


def test_rounded_copy_is_the_gradient_rounded_once(draw, labels) -> None:
    logits = draw(NUM_ROWS, VOCAB, dtype=torch.float32)
    lse, ones = logits.logsumexp(-1), torch.ones(NUM_ROWS)
    wide, out = logits.clone(), torch.empty(NUM_ROWS, VOCAB, dtype=torch.bfloat16)
    block_gradient_(wide, labels, lse, RowScales(ones, ones, None), first=0, softcap=None)
    block_gradient_(logits, labels, lse, RowScales(ones, ones, None), first=0, softcap=None, out=out)
    assert torch.equal(out, wide.bfloat16())


def test_an_ignored_row_is_zero_whatever_its_logits_are(labels) -> None:
    logits = torch.full((NUM_ROWS, VOCAB), torch.nan)
    logits[0] = 0.0
    scales = torch.where(torch.arange(NUM_ROWS) == 0, 1.0, 0.0)
    only_first = torch.where(torch.arange(NUM_ROWS) == 0, labels, -1)
    lse = torch.full((NUM_ROWS,), float(VOCAB)).log()
    block_gradient_(logits, only_first, lse, RowScales(scales, scales, scales), first=0, softcap=2.0)
    assert logits[0].any()
    assert not logits[1:].any()


def test_columns_at_minus_infinity_add_nothing() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    stats = block_stats(logits, torch.tensor([-1, 0]), None, first=0, softcap=None)
    assert stats.max.tolist() == [-torch.inf, 0.0]
    assert stats.sum_exp.tolist() == [0.0, 1.0]
