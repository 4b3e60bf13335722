"""The index function over rows of several lengths: every row once an epoch, one length per micro-batch, pure."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.workers.data.bucket_index import BucketIndex, Turn
from headrace.workers.data.index import RowSplit, StepIndex

LENGTHS, BATCHES = (4, 8, 32), (8, 4, 1)


def make(num_rows: list[int], *, world: int = 1, micro: int = 1, seed: int = 0, fraction: float = 0.0) -> BucketIndex:
    firsts = np.cumsum([0, *num_rows]).tolist()
    streams = tuple(
        StepIndex(RowSplit(num, fraction), seed, world, batch, 1, first_row=first)
        for num, batch, first in zip(num_rows, BATCHES, firsts, strict=False)
    )
    return BucketIndex(streams, micro, BATCHES[-1])


some_rows = st.lists(st.integers(0, 60), min_size=3, max_size=3).filter(any)


@settings(max_examples=60, deadline=None)
@given(num_rows=some_rows, world=st.integers(1, 3), seed=st.integers(0, 2**64))
def test_every_stream_is_read_in_order_and_every_row_once_an_epoch(num_rows: list[int], world: int, seed: int) -> None:
    index = make(num_rows, world=world, seed=seed)
    numbers, read = Counter[int](), {bucket: [] for bucket in range(3)}
    for m in range(40):
        turn = index.turn(m)
        assert turn == Turn(turn.bucket, numbers[turn.bucket])
        numbers[turn.bucket] += 1
        read[turn.bucket] += index.global_rows(m)[0].ravel().tolist()
        # The streams keep step with each other: each is within one micro-batch of its rate.
        for bucket, rate in enumerate(index._rates):
            assert abs(numbers[bucket] - (m + 1) * rate / index._rate) <= len(num_rows)
    first = 0
    for bucket, num in enumerate(num_rows):
        rows = read[bucket]
        for epoch in range(len(rows) // num if num else 0):
            assert sorted(rows[epoch * num : (epoch + 1) * num]) == list(range(first, first + num))
        first += num


@settings(max_examples=40, deadline=None)
@given(num_rows=some_rows, world=st.integers(1, 4), micro=st.integers(1, 5), step=st.integers(0, 10**12))
def test_ranks_share_the_length_and_the_rows(num_rows: list[int], world: int, micro: int, step: int) -> None:
    index = make(num_rows, world=world, micro=micro)
    whole = index.global_rows(step)
    for rank in range(world):
        for of_all, own in zip(whole, index.rank_rows(step, rank), strict=True):
            assert (of_all[rank] == own).all()
    for turn, rows in zip(index.turns(step), whole, strict=True):
        assert rows.shape == (world, BATCHES[turn.bucket])
        first = sum(num_rows[: turn.bucket])
        assert ((rows >= first) & (rows < first + num_rows[turn.bucket])).all()


def test_one_length_is_the_order_of_runs_without_buckets() -> None:
    one = StepIndex(RowSplit(53, 0.1), 5, 2, 3, 1)
    plain = StepIndex(RowSplit(53, 0.1), 5, 2, 3, 4)
    index = BucketIndex((one,), 4, 3)
    for step in (0, 1, 2, 5, 100, 10**9):
        assert (np.stack(index.global_rows(step)) == plain.global_rows(step)).all()
        assert index.epoch_of(step) == plain.epoch_of(step)
    assert index.global_batch == plain.global_batch


def test_the_order_of_a_run_never_changes_and_follows_its_seed() -> None:
    # A run that resumes under a later version must read on where it was.
    index = make([50, 40, 30], micro=12)
    assert "".join(str(turn.bucket) for turn in index.turns(0)) == GOLDEN
    orders = {tuple(turn.bucket for turn in make([50, 40, 30], micro=12, seed=s).turns(0)) for s in range(20)}
    assert len(orders) > 15
    shares = Counter(turn.bucket for turn in make([50, 40, 30], micro=1000).turns(3))
    assert [shares[b] / 1000 for b in range(3)] == pytest.approx(index.shares(), abs=0.003)


def test_held_out_rows_are_of_every_length_and_never_trained_on() -> None:
    index = make([50, 40, 30], micro=4, fraction=0.2)
    held_out = index.evaluation(30)
    kept = {row for rows in held_out.global_rows(0) for row in rows.ravel().tolist()}
    assert {turn.bucket for turn in held_out.turns(0)} == {0, 1, 2}
    seen = {row for step in range(60) for rows in index.global_rows(step) for row in rows.ravel().tolist()}
    assert not kept & seen
    assert len(seen) == 120 - index.num_eval
    other: Any = make([50, 40, 30], micro=9, seed=3, fraction=0.2).evaluation(30)
    assert other.turns(0) == held_out.turns(0)


GOLDEN = "012222122021"
