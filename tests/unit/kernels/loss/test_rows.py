"""The loss head in parts, each on some rows of the vocabulary, against the whole head by autograd."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.api import IGNORED_TARGET
from headrace.kernels.loss.rows import (
    Rows,
    hidden_part,
    labels_of,
    merged,
    row_gradients,
    row_statistics,
)

NUM_TOKENS, VOCAB, WIDTH = 13, 17, 8
# Of hidden states and rows, largest error over largest entry.
BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("sizes", [(17,), (9, 8), (1, 16, 0)])
def test_parts_make_the_loss_and_its_gradients(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both ways to the gradient of the hidden states: from the mean row, and from the LSE of all rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(NUM_TOKENS, WIDTH).to(dtype), torch.randn(VOCAB, WIDTH).to(dtype)
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,))
    targets[3:5] = IGNORED_TARGET
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="sum")
    expected.backward()

    labels, ends = labels_of(targets, IGNORED_TARGET), torch.tensor(sizes).cumsum(0).tolist()
    shards = [Rows(weight[end - size : end], end - size, tile=5) for size, end in zip(sizes, ends, strict=True)]
    found = [row_statistics(rows, hidden, labels, with_mean=True) for rows in shards]
    lse, losses = merged([own for own, _ in found])
    assert float(losses[labels >= 0].sum()) == pytest.approx(float(expected), rel=10 * BOUNDS[dtype])

    sums = [torch.zeros(rows.weight.shape, dtype=lse.dtype) for rows in shards]
    late = [
        row_gradients(rows, hidden, labels, lse, d_rows=own, with_hidden=True)
        for rows, own in zip(shards, sums, strict=True)
    ]
    early = [
        hidden_part(rows, mean, own, lse, labels)
        for rows, (own, mean) in zip(shards, found, strict=True)
        if mean is not None
    ]
    for grad, leaf in ((sum(early), leaves[0]), (sum(late), leaves[0]), (torch.cat(sums), leaves[1])):
        assert float((grad - leaf.grad).abs().max() / leaf.grad.abs().max()) <= BOUNDS[dtype]
