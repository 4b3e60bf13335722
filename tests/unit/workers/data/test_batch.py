"""Rows to batches: targets and packing against a token-by-token oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.kernels.api import attention
from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import to_batch
from headrace.workers.data.rows import STARTS, TARGET


def random_rows(seed: int, batch_size: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shape = (batch_size, seq_len + 1)
    tokens = generator.integers(0, 60_000, shape).astype(np.uint16)
    flags = (generator.random(shape) < 0.2) * STARTS | (generator.random(shape) < 0.7) * TARGET
    flags[:, 0] |= STARTS
    return tokens, flags.astype(np.uint8)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (1, 17), (3, 8), (2, 40)])
def test_batch_equals_the_oracle(batch_size: int, seq_len: int) -> None:
    for seed in range(10):
        tokens, flags = random_rows(seed, batch_size, seq_len)
        batch = to_batch(tokens, flags)
        segments = flags.cumsum(axis=1) * 0 + (flags & STARTS).astype(np.int64).cumsum(axis=1)
        lengths, num_targets = [], 0
        for b in range(batch_size):
            for t in range(seq_len):
                assert batch.tokens[b, t] == tokens[b, t]
                same_document = segments[b, t + 1] == segments[b, t]
                counts = same_document and flags[b, t + 1] & TARGET
                assert batch.targets[b, t] == (tokens[b, t + 1] if counts else -100)
                num_targets += bool(counts)
            inside = segments[b, :seq_len]
            lengths += [int((inside == s).sum()) for s in np.unique(inside)]
        assert batch.num_targets == num_targets
        assert batch.packing.lengths == tuple(lengths)
        assert batch.packing.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
        assert batch.packing.cu_seqlens.dtype == torch.int32
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.tokens.is_contiguous()


def test_a_batch_does_not_follow_the_buffers_it_came_from() -> None:
    tokens, flags = random_rows(0, 2, 5)
    batch = to_batch(tokens, flags)
    before = batch.tokens.clone(), batch.targets.clone()
    tokens[:], flags[:] = 0, 0
    assert torch.equal(batch.tokens, before[0])
    assert torch.equal(batch.targets, before[1])


def test_more_tokens_than_attention_can_count_are_refused() -> None:
    tokens = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2, 2**30 + 2), (0, 0))
    with pytest.raises(InputError, match=r"2147483650 tokens in a micro-batch"):
        to_batch(tokens, tokens.view(np.uint16))


def test_attention_under_the_packing_stays_within_each_document() -> None:
    tokens, flags = random_rows(3, 2, 40)
    packing = to_batch(tokens, flags).packing
    packing.check(2, 40)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    out = attention(q, k, v, scale=8**-0.5, packing=packing)
    begin = 0
    for length in packing.lengths:
        row, first = divmod(begin, 40)
        alone = (t[row : row + 1, first : first + length] for t in (q, k, v))
        assert torch.allclose(out[row : row + 1, first : first + length], attention(*alone, scale=8**-0.5), atol=1e-12)
        begin += length
    assert len(packing.lengths) > 4
    assert not torch.allclose(out, attention(q, k, v, scale=8**-0.5))
