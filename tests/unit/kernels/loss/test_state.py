"""Input and weight gradients as separate calls: the same bits as the joint backward."""

from __future__ import annotations

import pytest
import torch

from headrace.kernels.api import ChunkAxis, LossOptions, linear_cross_entropy, split_linear_cross_entropy

NUM_TOKENS, WIDTH, VOCAB = 14, 6, 37
OPTIONS = {
    "tokens": LossOptions(axis=ChunkAxis.tokens, tokens_per_chunk=5),
    "vocabulary": LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=5, columns_per_chunk=8),
    "left_out": LossOptions(axis=ChunkAxis.vocabulary, columns_per_chunk=16),
}


@pytest.fixture
def targets() -> torch.Tensor:
    drawn = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    drawn[0, ::3] = -100
    return drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("axis", "reduction", "return_lse"),
    [
        ("tokens", "mean", False),
        ("tokens", "sum", False),
        ("vocabulary", "mean", False),
        ("vocabulary", "none", True),
        ("left_out", "none", False),
    ],
)
def test_bit_equal_to_the_joint_backward(draw, targets, dtype, axis, reduction, return_lse) -> None:
    leaves = [draw(2, 7, WIDTH, dtype=dtype), draw(VOCAB, WIDTH, dtype=dtype), draw(VOCAB, dtype=dtype)]
    call = {"reduction": reduction, "return_lse": return_lse, "softcap": 5.0, "options": OPTIONS[axis]}
    joint = [leaf.clone().requires_grad_() for leaf in leaves]
    out = linear_cross_entropy(joint[0], joint[1], targets, bias=joint[2], **call)
    outs = list(out) if return_lse else [out]
    upstream = [draw(*o.shape, dtype=torch.float32) for o in outs]
    expected = torch.autograd.grad(outs, joint, upstream)

    for first in ("d_input", "d_weight"):
        split, state = split_linear_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], **call)
        splits = list(split) if return_lse else [split]
        assert all(torch.equal(a, b) for a, b in zip(splits, outs, strict=True))
        assert not splits[0].requires_grad
        if first == "d_input":
            d_hidden = state.d_input(*upstream)
            d_weight, d_bias = state.d_weight(*upstream)
        else:
            d_weight, d_bias = state.d_weight(*upstream)
            d_hidden = state.d_input(*upstream)
        for got, wanted in zip((d_hidden, d_weight, d_bias), expected, strict=True):
            assert got.dtype is dtype
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("axis", ["tokens", "vocabulary"])
def test_each_call_runs_once_and_one_upstream_by_default(draw, targets, axis) -> None:
    hidden, weight = draw(2, 7, WIDTH), draw(VOCAB, WIDTH)
    _, state = split_linear_cross_entropy(hidden, weight, targets, options=OPTIONS[axis])
    d_hidden, (d_weight, d_bias) = state.d_input(), state.d_weight()
    assert d_bias is None
    joint = [hidden.requires_grad_(), weight.requires_grad_()]
    expected = torch.autograd.grad(linear_cross_entropy(*joint, targets, options=OPTIONS[axis]), joint)
    assert torch.equal(d_hidden, expected[0])
    assert torch.equal(d_weight, expected[1])
    with pytest.raises(RuntimeError, match="d_input runs once"):
        state.d_input()
    with pytest.raises(RuntimeError, match="d_weight runs once"):
        state.d_weight()


def test_a_cotangent_that_does_not_fit_is_named_and_does_not_spend_the_state(draw, targets) -> None:
    _, state = split_linear_cross_entropy(draw(2, 7, WIDTH), draw(VOCAB, WIDTH), targets, options=OPTIONS["vocabulary"])
    with pytest.raises(ValueError, match=r"cotangent: torch.float64 of shape \(2,\)"):
        state.d_input(torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"cotangent: torch\.float32"):
        state.d_weight(torch.ones(()))
    with pytest.raises(ValueError, match=r"lse_cotangent.*return_lse=True"):
        state.d_input(None, torch.ones(14))
    assert state.d_input().shape == (2, 7, WIDTH)


def test_along_the_vocabulary_little_is_held_between_the_calls(draw, targets) -> None:
    """Several micro-batches may wait: each holds an LSE per token, not a gradient of the weight."""
    _, state = split_linear_cross_entropy(draw(2, 7, WIDTH), draw(VOCAB, WIDTH), targets, options=OPTIONS["vocabulary"])
    assert state._made is None
    assert state._scored_lse.shape == (14,)
