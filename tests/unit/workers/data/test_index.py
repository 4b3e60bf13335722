"""The index function: bijective, uniform, the same for every cut into ranks, and never changing."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.storage.core.errors import InputError
from headrace.workers.data.index import RowSplit, StepIndex, permute


def permutation(num_rows: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute(np.arange(num_rows), num_rows, seed, np.full(num_rows, epoch))


@pytest.mark.parametrize("num_rows", [*range(1, 70), 255, 256, 257, 1000, 4097])
def test_permute_is_a_bijection(num_rows: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (-1, 0), (2**70 + 5, 3)):
        assert sorted(permutation(num_rows, seed, epoch)) == list(range(num_rows))


def test_the_order_of_a_run_never_changes() -> None:
    # A run that resumes under a later version must read on where it was.
    assert permutation(10, seed=0, epoch=0).tolist() == GOLDEN_SEED_0
    assert permutation(10, seed=1, epoch=2).tolist() == GOLDEN_SEED_1_EPOCH_2


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_every_row_is_equally_likely_everywhere() -> None:
    num_rows, num_orders = 7, 1400
    counts = np.zeros((num_rows, num_rows))
    for seed in range(num_orders):
        counts[np.arange(num_rows), permutation(num_rows, seed)] += 1
    expected = num_orders / num_rows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 70.2  # 36 degrees of freedom: exceeded once in 2000 fair shuffles


def test_permute_works_row_by_row_and_far_out() -> None:
    whole = permutation(1000, seed=3, epoch=1)
    for position in (0, 17, 999):
        assert permute(np.array(position), 1000, 3, np.array(1)) == whole[position]
    far = permute(np.arange(5), 2**40 + 12345, 0, np.zeros(5, dtype=np.int64))
    assert len(set(far.tolist())) == 5
    assert ((far >= 0) & (far < 2**40 + 12345)).all()
    assert far.max() > 2**32


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 97, 1000])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.3, 0.5, 0.99])
def test_split_parts_the_rows(num_rows: int, fraction: float) -> None:
    split = RowSplit(num_rows, fraction)
    train = split.train_row(np.arange(split.num_train))
    held_out = split.eval_row(np.arange(split.num_eval)) if split.num_eval else np.array([], dtype=np.int64)
    assert sorted([*train, *held_out]) == list(range(num_rows))
    assert (np.diff(train) > 0).all()
    assert split.num_train >= 1
    if fraction > 0 and num_rows > 1:
        assert split.num_eval == min(max(1, round(num_rows * fraction)), num_rows - 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5])
def test_split_refuses_a_fraction_that_is_none(fraction: float) -> None:
    with pytest.raises(InputError, match="eval_fraction"):
        RowSplit(10, fraction)


def step_index(world: int, batch: int, micro: int, num_rows: int = 53) -> StepIndex:
    return StepIndex(RowSplit(num_rows, 0.1), seed=5, world_size=world, batch_size=batch, micro_batches=micro)


@pytest.mark.parametrize("cut", [(1, 1, 8), (2, 1, 4), (4, 1, 2), (8, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_rows_of_a_step_do_not_depend_on_the_ranks(cut: tuple[int, int, int]) -> None:
    one, other = step_index(1, 1, 8), step_index(*cut)
    for step in (0, 1, 5, 6, 100, 10**9):  # 47 training rows: steps 5 and 11 straddle epochs
        rows = np.concatenate([other.rank_rows(step, rank).ravel() for rank in range(cut[0])])
        assert sorted(rows) == sorted(one.rank_rows(step, 0).ravel())


def test_micro_batches_of_many_ranks_are_those_of_one() -> None:
    one, two = step_index(1, 3, 8), step_index(2, 3, 4)
    micro_batches = [two.rank_rows(9, rank)[m].tolist() for m in range(4) for rank in range(2)]
    assert micro_batches == one.rank_rows(9, 0).tolist()


def test_every_epoch_has_an_order_of_its_own() -> None:
    index = StepIndex(RowSplit(40, 0.0), seed=5, world_size=1, batch_size=40, micro_batches=1)
    orders = {tuple(index.rank_rows(epoch, 0)[0]) for epoch in range(10)}
    assert len(orders) == 10


def test_an_epoch_reads_every_training_row_once() -> None:
    index = step_index(2, 2, 2)
    num_train = index.split.num_train
    stream = np.concatenate([index.global_rows(step).ravel() for step in range(18)])
    training = sorted(index.split.train_row(np.arange(num_train)))
    for epoch in range(3):
        assert sorted(stream[epoch * num_train : (epoch + 1) * num_train]) == training
    assert index.epoch_of(0) == 0
    assert index.epoch_of(num_train) == 8


def test_held_out_rows_are_never_trained_on() -> None:
    train = step_index(1, 1, 8)
    held_out = StepIndex(train.split, 0, 1, 1, 8, held_out=True)
    seen = {int(row) for step in range(20) for row in train.global_rows(step).ravel()}
    assert not seen & {int(row) for step in range(5) for row in held_out.global_rows(step).ravel()}


GOLDEN_SEED_0 = [7, 8, 2, 6, 9, 3, 0, 4, 5, 1]
GOLDEN_SEED_1_EPOCH_2 = [9, 1, 5, 4, 0, 7, 6, 3, 8, 2]
