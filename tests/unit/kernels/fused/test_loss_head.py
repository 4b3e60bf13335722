"""The whole loss head with the Triton steps in it, both axes, against the whole matrix of logits in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.tolerances import REL_ERROR, rel_error
from headrace.kernels.api import Backend, ChunkAxis, FilterStats, LossOptions, linear_cross_entropy

NUM_TOKENS, WIDTH, VOCAB, CAP = 7, 5, 301, 3.0
AXES = {
    "tokens": LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=4),
    "vocabulary": LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=4, columns_per_chunk=150),
}


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.7))]


@pytest.mark.parametrize("axis", AXES)
def test_every_term_at_once(draw, axis: str) -> None:
    inputs = [draw(NUM_TOKENS, WIDTH, dtype=torch.float32), draw(VOCAB, WIDTH, dtype=torch.float32)]
    inputs += [draw(VOCAB, dtype=torch.float32)]
    class_weight, targets = draw(VOCAB).abs().float(), torch.tensor([0, 149, 150, -100, 300, 5, 299])
    terms: dict[str, Any] = {"softcap": CAP, "label_smoothing": 0.1, "class_weight": class_weight, "z_loss": 0.05}
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], options=AXES[axis], backend=Backend.triton, **terms
    )
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    logits = CAP * torch.tanh((exact[0] @ exact[1].T + exact[2]) / CAP)
    weights = class_weight.double()
    total = F.cross_entropy(logits, targets, weight=weights, label_smoothing=0.1, reduction="sum")
    total = total + 0.05 * (logits.logsumexp(-1).square() * (targets != -100)).sum()
    expected = gradients(total / weights[targets[targets != -100]].sum(), exact)
    found = [rel_error(a, b) for a, b in zip(gradients(loss, leaves), expected, strict=True)]
    assert max(found) <= REL_ERROR["linear_cross_entropy"][torch.float32], found


@pytest.mark.parametrize("axis", AXES)
def test_filter_counts_like_the_reference(draw, axis: str) -> None:
    hidden, weight = draw(NUM_TOKENS, WIDTH, dtype=torch.float32), draw(VOCAB, WIDTH, dtype=torch.float32)
    weight[128:, 0], hidden[:, 0] = -20.0, 2.0
    found = []
    for backend in (Backend.reference, Backend.triton):
        stats = FilterStats()
        options = replace(AXES[axis], filter_eps=2.0**-12, filter_stats=stats)
        leaf = weight.clone().requires_grad_()
        linear_cross_entropy(hidden, leaf, torch.arange(NUM_TOKENS), options=options, backend=backend).backward()
        found.append((stats.summary(), leaf.grad))
    assert found[0][0] == found[1][0]
    assert found[0][0].num_starved_rows > 0
    assert rel_error(found[1][1], found[0][1]) <= REL_ERROR["linear_cross_entropy"][torch.float32]
