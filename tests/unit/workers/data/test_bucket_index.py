"""The index function over rows of several lengths: every row once an epoch, one length per micro-batch, pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
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
ORDERS = {"num_rows": some_rows, "world": st.integers(1, 3), "seed": st.integers(0, 2**64)}
CUTS = {"num_rows": some_rows, "world": st.integers(1, 4), "micro": st.integers(1, 5)}
SHARES, RESUMES = CUTS | {"step": st.integers(0, 10**12)}, CUTS | {"first": st.integers(0, 10**9)}


@settings(max_examples=60, deadline=None)
@given(**ORDERS)
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
@given(**SHARES)
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


@settings(max_examples=40, deadline=None)
@given(**RESUMES)
def test_steps_from_anywhere_read_the_micro_batches_of_the_run_in_order(
    num_rows: list[int], world: int, micro: int, first: int
) -> None:
    """What a run reads that resumes at step `first`: each micro-batch of the run once, none left out."""
    whole = make(num_rows, world=world)
    for step in range(first, first + 3):
        resumed = make(num_rows, world=world, micro=micro)  # the step number is the whole state
        numbers = range(step * micro, (step + 1) * micro)
        assert resumed.turns(step) == [whole.turn(number) for number in numbers]
        for rows, number in zip(resumed.global_rows(step), numbers, strict=True):
            assert (rows == whole.global_rows(number)[0]).all()


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


TURN, TURNS, STREAM_ROWS = BucketIndex.turn, BucketIndex.turns, StepIndex._rows


def again(self: BucketIndex, number: int) -> Turn:
    """The second micro-batch of a stream is the first one again."""
    turn = TURN(self, number)
    return replace(turn, number=max(0, turn.number - 1))


def last_is_first(self: StepIndex, step: int, slots: Any) -> Any:
    """The row at the end of an epoch is the one that began it."""
    rows, positions = STREAM_ROWS(self, step, slots), step * self.global_batch + slots
    begins = STREAM_ROWS(self, 0, positions // self.epoch_rows * self.epoch_rows)
    return np.where(positions % self.epoch_rows == self.epoch_rows - 1, begins, rows)


def own_turns(self: BucketIndex, step: int, rank: int) -> Any:
    """Every rank takes its lengths from another step."""
    return [self.streams[turn.bucket].rank_rows(turn.number, rank)[0] for turn in self.turns(step + rank)]


def one_behind(self: BucketIndex, step: int) -> list[Turn]:
    """The first step is right, later ones read the one before them."""
    return TURNS(self, max(0, step - 1))


def overlapping(self: BucketIndex, step: int) -> list[Turn]:
    """A step begins with the last micro-batch of the one before it."""
    return [self.turn(max(0, step * self.micro_batches + i - (step > 0))) for i in range(self.micro_batches)]


@pytest.mark.parametrize(
    ("of", "name", "mutant", "test", "values"),
    [
        (BucketIndex, "turn", again, test_every_stream_is_read_in_order_and_every_row_once_an_epoch, ORDERS),
        (StepIndex, "_rows", last_is_first, test_every_stream_is_read_in_order_and_every_row_once_an_epoch, ORDERS),
        (BucketIndex, "rank_rows", own_turns, test_ranks_share_the_length_and_the_rows, SHARES),
        (
            BucketIndex,
            "turns",
            one_behind,
            test_steps_from_anywhere_read_the_micro_batches_of_the_run_in_order,
            RESUMES,
        ),
        (
            BucketIndex,
            "turns",
            overlapping,
            test_steps_from_anywhere_read_the_micro_batches_of_the_run_in_order,
            RESUMES,
        ),
    ],
)
def test_mutants_of_the_index_are_seen(
    of: type, name: str, mutant: Any, test: Any, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = settings(max_examples=40, deadline=None, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    monkeypatch.setattr(of, name, mutant)
    with pytest.raises(AssertionError):
        once(given(**values)(test.hypothesis.inner_test))()


GOLDEN = "012222122021"
