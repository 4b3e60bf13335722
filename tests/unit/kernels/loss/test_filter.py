"""Gradient filtering: exact below nothing, an error below the threshold, and counts of what was left out."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tolerances import rel_error
from headrace.kernels.api import ChunkAxis, FilterStats, LossOptions, filter_threshold, linear_cross_entropy
from headrace.kernels.loss.steps import RowScales, block_gradient_

NUM_TOKENS, WIDTH, VOCAB = 200, 8, 300
AXES = {
    "tokens": LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=150),
    "vocabulary": LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=150, columns_per_chunk=256),
}


@pytest.fixture
def peaked(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every token is sure of one of 100 classes; classes 128 to 299 hardly ever get any probability."""
    weight = draw(VOCAB, WIDTH, dtype=torch.float32)
    weight[:, 0] = torch.where(torch.arange(VOCAB) < 128, 4.0, -4.0)
    hidden = draw(NUM_TOKENS, WIDTH, dtype=torch.float32)
    hidden[:, 0] = 2.0
    return hidden, weight, torch.arange(NUM_TOKENS) % 100


@pytest.mark.parametrize("axis", AXES)
def test_starved_rows_and_keep_rate(run, peaked, axis) -> None:
    hidden, weight, targets = peaked
    stats, options = FilterStats(), AXES[axis]
    filtered = LossOptions(**{**vars(options), "filter_eps": 2.0**-12, "filter_stats": stats})
    exact = run(linear_cross_entropy, [hidden, weight], targets=targets, options=options)
    got = run(linear_cross_entropy, [hidden, weight], targets=targets, options=filtered)
    assert torch.equal(got[0], exact[0])  # the loss is not filtered
    assert torch.equal(got[2][:128], exact[2][:128])  # the tiles that were kept, bit for bit
    assert 0 < rel_error(got[1], exact[1]) < 1e-3
    starved = ~got[2].any(1)
    summary = stats.summary()
    assert summary.num_starved_rows == int(starved.sum()) == VOCAB - 128
    assert exact[2].any(1).all()
    # 2 chunks (one tile of 128 tokens and a ragged one each, but the last) by 3 tiles of columns; 1 of 3 is kept.
    assert summary.keep_rate == pytest.approx(1 / 3)
    assert summary.num_rows == VOCAB


def test_counts_add_up_over_micro_batches_until_reset(run, peaked) -> None:
    """A row is starved only where no micro-batch kept a tile of it."""
    hidden, weight, targets = peaked
    stats = FilterStats()
    options = LossOptions(filter_eps=2.0**-12, filter_stats=stats)
    run(linear_cross_entropy, [hidden, weight], targets=targets, options=options)
    run(linear_cross_entropy, [-hidden, weight], targets=targets + 200 - targets % 100, options=options)
    assert stats.summary().num_starved_rows == 0
    stats.reset()
    assert stats.summary() == (1.0, 0, 0)
    run(linear_cross_entropy, [hidden, weight], targets=targets, options=options)
    with pytest.raises(ValueError, match="a weight of 128 rows after one of 300"):
        run(linear_cross_entropy, [hidden, weight[:128]], targets=targets, options=options)


def test_a_threshold_below_everything_is_exact(run, peaked) -> None:
    hidden, weight, targets = peaked
    hidden = hidden / 8
    for options in AXES.values():
        stats = FilterStats()
        filtered = LossOptions(**{**vars(options), "filter_eps": 1e-30, "filter_stats": stats})
        exact = run(linear_cross_entropy, [hidden, weight], targets=targets, options=options)
        got = run(linear_cross_entropy, [hidden, weight], targets=targets, options=filtered)
        assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
        assert stats.summary().keep_rate == 1.0


def test_the_test_is_on_the_tile_and_before_the_upstream_gradient(run, peaked) -> None:
    """A small upstream gradient filters nothing more."""
    hidden, weight, targets = peaked
    rates, eps = [], filter_threshold(torch.bfloat16)
    for scale in (1.0, 1e-6):
        stats = FilterStats()
        options = LossOptions(axis=ChunkAxis.vocabulary, filter_eps=eps, filter_stats=stats)
        leaf = weight.clone().requires_grad_()
        (linear_cross_entropy(hidden, leaf, targets, reduction="none", options=options) * scale).sum().backward()
        rates.append(stats.summary())
    assert rates[0] == rates[1]


def test_a_tile_with_one_entry_at_the_threshold_is_kept_whole() -> None:
    logits = torch.full((130, 260), -20.0)
    logits[129, 0] = torch.tensor(0.5).log()
    scales = RowScales(torch.ones(130), torch.zeros(130), None)
    labels, lse = torch.full((130,), 1000), torch.zeros(130)
    expected = logits.exp()
    kept = block_gradient_(logits, labels, lse, scales, first=0, softcap=None, filter_eps=0.5)
    assert kept.tolist() == [[False, False, False], [True, False, False]]
    assert torch.equal(logits[128:, :128], expected[128:, :128])
    assert not logits[:128].any()
    assert not logits[:, 128:].any()
