"""Seeded random tokens for both sides of a comparison."""

from __future__ import annotations

import itertools

import torch

from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.workers.data.batch import TokenBatch
from headrace.workers.verify.config import VerifyConfig


def random_batches(config: VerifyConfig, vocab_size: int, seed: int) -> list[list[TokenBatch]]:
    """Micro-batches of every step: uniform tokens, a pure function of the arguments.

    The target of a document's last token, which would belong to the next document, does not count in the loss, and of a
    prompt with responses none does. Of the
    i-th of n micro-batches a share i / 2n of the other targets does not count either: with equal counts a mean of means
    would pass for the mean.

    Args:
        vocab_size: token ids are drawn below it.

    Returns:
        [step][micro_batch] of TokenBatch with tokens and targets (batch, seq_len) int64 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = [i / (2 * config.micro_batches) for i in range(config.micro_batches)]
    return [[_one(config, vocab_size, share, generator) for share in shares] for _ in range(config.steps)]


def _one(config: VerifyConfig, vocab_size: int, share: float, generator: torch.Generator) -> TokenBatch:
    rows, columns = config.batch, config.seq_len
    ids = torch.randint(vocab_size, (rows, columns + 1), generator=generator)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    ignored = torch.rand(rows, columns, generator=generator) < share
    ignored[:, -1] = False
    targets[ignored] = IGNORED_TARGET
    group = 1 + config.responses
    borders = [0]
    for row in range(rows):
        cuts = 1 + torch.randperm(columns - 1, generator=generator)[: config.documents * group - 1].sort().values
        for number, cut in enumerate([*cuts.tolist(), columns]):
            if cut < columns:
                targets[row, cut - 1] = IGNORED_TARGET
            if config.responses and number % group == 0:
                targets[row, borders[-1] - row * columns : cut] = IGNORED_TARGET
            borders.append(row * columns + cut)
    lengths = [end - begin for begin, end in itertools.pairwise(borders)]
    parents = [None if number % group == 0 else number - number % group for number in range(len(lengths))]
    return TokenBatch(tokens, targets, Packing.of_lengths(lengths, parents=parents if config.responses else ()))
