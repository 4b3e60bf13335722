"""Which rows a step reads: a pure function of (seed, step), with no state and no memory that grows with the data.

    position = step * global_batch + slot          slot = (micro_batch * world_size + rank) * batch_size + i
    epoch    = position // num_rows
    row      = permute(position % num_rows; seed, epoch)

The rows of a step depend on the ranks only through `global_batch = world_size * batch_size * micro_batches`. A run may
therefore stop after any step, start again with another number of ranks, and read on where it was: the step number is
the whole state. A step may straddle two epochs; nothing is dropped at the border.

The permutation is a Feistel network over the next power of four, walked until it lands inside the data (Black and
Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). It is integer arithmetic only, so a new NumPy cannot
change the order in the middle of a run, as its own generators may.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from headrace.storage.core.errors import InputError

RowNumbers = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_NUM_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


def mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(positions: RowNumbers, num_rows: int, seed: int, epochs: RowNumbers) -> RowNumbers:
    """Shuffle positions of an epoch.

    Args:
        positions: numbers in [0, num_rows), any shape, int64.
        num_rows: length of an epoch, at most 2^62.
        seed: any integer (its low 64 bits count).
        epochs: epoch of every position, same shape.

    Returns:
        For a fixed (seed, epoch) a bijection of [0, num_rows), int64, same shape as `positions`.
    """
    half_bits = max(1, ((num_rows - 1).bit_length() + 1) // 2)
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = mix(mix(np.atleast_1d(np.uint64(seed & _MASK_64))) ^ np.asarray(epochs).astype(np.uint64).ravel())
    values = np.asarray(positions).astype(np.uint64).ravel()
    walking = np.arange(values.size)
    while walking.size:
        left, right, key = values[walking] >> shift, values[walking] & half_mask, keys[walking]
        for round_number in range(_NUM_ROUNDS):
            left, right = right, left ^ (mix(right ^ mix(key + np.uint64(round_number))) & half_mask)
        values[walking] = (left << shift) | right
        walking = walking[values[walking] >= np.uint64(num_rows)]
    return values.astype(np.int64).reshape(np.shape(positions))


@dataclass(frozen=True)
class RowSplit:
    """The rows of a data set, cut into those to train on and those held out.

    Held-out rows are evenly spaced over the data and do not depend on the run's seed, so that runs compare. A document
    longer than a row can have rows on both sides.

    Args:
        num_rows: of the data set.
        eval_fraction: share held out; above 0 it is at least one row wherever there are two.

    Raises:
        InputError: the fraction is outside [0, 1).
    """

    num_rows: int
    eval_fraction: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.eval_fraction < 1.0:
            raise InputError(f"data.eval_fraction={self.eval_fraction}: give a share of the rows in [0, 1)")

    @property
    def num_eval(self) -> int:
        """Rows held out; at least one row stays to train on."""
        if self.eval_fraction == 0.0 or self.num_rows == 0:
            return 0
        return min(max(1, round(self.num_rows * self.eval_fraction)), self.num_rows - 1)

    @property
    def num_train(self) -> int:
        """Rows to train on."""
        return self.num_rows - self.num_eval

    def eval_row(self, ordinals: RowNumbers) -> RowNumbers:
        """Row numbers of the held-out rows with these ordinals (0 .. num_eval - 1)."""
        return (2 * np.asarray(ordinals, dtype=np.int64) + 1) * self.num_rows // (2 * self.num_eval)

    def train_row(self, ordinals: RowNumbers) -> RowNumbers:
        """Row numbers of the training rows with these ordinals (0 .. num_train - 1)."""
        ordinals = np.asarray(ordinals, dtype=np.int64)
        if self.num_eval == 0:
            return ordinals
        # Held-out row i comes before training row k where eval_row(i) - i <= k, which is
        # (2i + 1) * num_rows < 2 * num_eval * (k + i + 1): solved for i, it counts the held-out rows to step over.
        before = -((self.num_rows - 2 * self.num_eval * (ordinals + 1)) // (2 * self.num_train))
        return ordinals + np.maximum(before, 0)


@dataclass(frozen=True)
class StepIndex:
    """The index function of one run.

    Args:
        split: which rows there are.
        seed: of the shuffle.
        world_size, batch_size, micro_batches: their product is the global batch.
        held_out: read the held-out rows in place of the training rows.
        first_row: number of the first row of the data, where others come before it.
    """

    split: RowSplit
    seed: int
    world_size: int
    batch_size: int
    micro_batches: int
    held_out: bool = False
    first_row: int = 0

    @property
    def eval_fraction(self) -> float:
        """Share of the rows held out."""
        return self.split.eval_fraction

    @property
    def num_eval(self) -> int:
        """Rows held out."""
        return self.split.num_eval

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks."""
        return self.world_size * self.batch_size * self.micro_batches

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return self.split.num_eval if self.held_out else self.split.num_train

    def evaluation(self, num: int) -> StepIndex:
        """Of `num` held-out micro-batches, in an order that depends on nothing but the data: those of step 0."""
        return replace(self, seed=0, micro_batches=num, held_out=True)

    def epoch_of(self, step: int) -> float:
        """Epochs read when `step` begins, with the fraction."""
        return step * self.global_batch / self.epoch_rows

    def global_rows(self, step: int) -> RowNumbers:
        """Rows of `step`: int64 of shape (micro_batches, world_size, batch_size)."""
        return self._rows(step, self._slots())

    def rank_rows(self, step: int, rank: int) -> RowNumbers:
        """Rows that `rank` reads in `step`: int64 of shape (micro_batches, batch_size)."""
        return self._rows(step, self._slots()[:, rank])

    def _slots(self) -> RowNumbers:
        slots = np.arange(self.global_batch, dtype=np.int64)
        return slots.reshape(self.micro_batches, self.world_size, self.batch_size)

    def _rows(self, step: int, slots: RowNumbers) -> RowNumbers:
        positions = step * self.global_batch + slots
        ordinals = permute(positions % self.epoch_rows, self.epoch_rows, self.seed, positions // self.epoch_rows)
        return self.first_row + (self.split.eval_row(ordinals) if self.held_out else self.split.train_row(ordinals))
