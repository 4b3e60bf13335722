"""Which axis, which cut: the break-even, the workspace, and the byte counts that fix what to aim for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.kernels.api import ChunkAxis, LossOptions, filter_threshold
from headrace.kernels.loss.options import MIB, Cuts, HeadShape, choose_axis, plan_cuts, seconds

# 8,192 tokens, bf16 logits alone, as the break-even was worked out.
GEMMA_2_2B = HeadShape(8192, 256_000, 2304, logit_bytes=2)
LLAMA_3_8B = HeadShape(8192, 128_256, 4096, logit_bytes=2)


def test_bytes_of_logits_and_gradients() -> None:
    num_tokens, vocab_size, width = 8192, 256_000, 2304
    logits = num_tokens * vocab_size
    gradients = vocab_size * width + num_tokens * width
    assert (logits * 4 / MIB, logits * 2 / MIB) == (8000.0, 4000.0)
    assert (gradients * 2 / MIB, gradients * 4 / MIB) == (1161.0, 2322.0)


def test_filter_thresholds() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert [filter_threshold(dtype) for dtype in dtypes] == [2.0**-12, 2.0**-15, 2.0**-28]


def test_tokens_win_at_128k_and_vocabulary_at_256k() -> None:
    gemma, llama = (plan_cuts(shape, LossOptions(), in_forward=True) for shape in (GEMMA_2_2B, LLAMA_3_8B))
    assert gemma.axis is ChunkAxis.vocabulary
    assert (llama.axis, llama.tokens) == (ChunkAxis.tokens, 1024)
    forced = plan_cuts(GEMMA_2_2B, LossOptions(axis=ChunkAxis.tokens), in_forward=True)
    assert forced.tokens == 512


def test_break_even_is_near_790_tokens() -> None:
    """Of a long sequence; the vocabulary axis' own sums move it by a few per cent."""
    shape = HeadShape(10**6, 131_072, 4096, logit_bytes=2)
    vocabulary = Cuts(ChunkAxis.vocabulary, 10**6, 131_072)

    def axis(tokens: int) -> ChunkAxis:
        return choose_axis(shape, Cuts(ChunkAxis.tokens, tokens, 131_072), vocabulary)

    assert axis(780) is ChunkAxis.vocabulary
    assert axis(800) is ChunkAxis.tokens


def test_a_single_chunk_adds_nothing_up() -> None:
    for num_tokens in (1, 64, 200):
        cuts = plan_cuts(replace(GEMMA_2_2B, num_tokens=num_tokens), LossOptions(), in_forward=True)
        assert (cuts.axis, cuts.tokens) == (ChunkAxis.tokens, num_tokens)


def test_times_at_the_gemma_shape() -> None:
    """36.8 ms for three products, 49.1 ms for four; re-adding the sum at 524 tokens a chunk costs about 19 ms."""
    three = seconds(GEMMA_2_2B, Cuts(ChunkAxis.tokens, 8192, 256_000))
    four = seconds(GEMMA_2_2B, Cuts(ChunkAxis.vocabulary, 8192, 256_000))
    assert (three * 1e3, four * 1e3) == pytest.approx((36.8, 49.1), abs=0.1)
    assert (seconds(GEMMA_2_2B, Cuts(ChunkAxis.tokens, 524, 256_000)) - three) * 1e3 == pytest.approx(19, rel=0.1)


@pytest.mark.parametrize("num_tokens", [1, 100, 8192, 113_360, 2**20])
@pytest.mark.parametrize("vocab_size", [1, 1000, 128_256, 256_000])
@pytest.mark.parametrize("workspace_bytes", [16 * MIB, 256 * MIB])
@pytest.mark.parametrize("axis", list(ChunkAxis))
def test_blocks_fit_the_workspace(num_tokens, vocab_size, workspace_bytes, axis) -> None:
    shape = HeadShape(num_tokens, vocab_size, 2304, logit_bytes=10)
    cuts = plan_cuts(shape, LossOptions(axis=axis, workspace_bytes=workspace_bytes), in_forward=True)
    assert axis in (ChunkAxis.auto, cuts.axis)
    assert 1 <= cuts.tokens <= num_tokens
    assert 1 <= cuts.columns <= vocab_size
    block_bytes = cuts.tokens * cuts.columns * 10
    if cuts.axis is ChunkAxis.vocabulary:
        block_bytes += cuts.columns * 2304 * 4  # the slice of the weight gradient's sum
    assert block_bytes <= workspace_bytes
    if cuts.axis is ChunkAxis.tokens and cuts.tokens < num_tokens:
        assert 2 * block_bytes > workspace_bytes  # and it is used


def test_fixed_cuts_are_kept() -> None:
    options = LossOptions(axis=ChunkAxis.vocabulary, tokens_per_chunk=7, columns_per_chunk=100)
    assert plan_cuts(GEMMA_2_2B, options, in_forward=True) == Cuts(ChunkAxis.vocabulary, 7, 100)
    columns_say_which_axis = LossOptions(columns_per_chunk=2000)
    assert plan_cuts(LLAMA_3_8B, columns_say_which_axis, in_forward=True).axis is ChunkAxis.vocabulary
    assert plan_cuts(LLAMA_3_8B, LossOptions(), in_forward=False).axis is ChunkAxis.vocabulary
    with pytest.raises(ValueError, match=r"options\.axis=tokens"):
        plan_cuts(LLAMA_3_8B, LossOptions(axis=ChunkAxis.tokens), in_forward=False)
