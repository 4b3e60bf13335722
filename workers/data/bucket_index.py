"""Which rows a step reads, where rows have several lengths: a pure function of (seed, step), as in index.py.

A micro-batch has rows of one length, the same on all ranks. The micro-batches of one length are a stream of their own
with the order of index.py: every row of the length is there once per epoch of the stream, and a micro-batch may
straddle two epochs. The streams are interleaved by a clock that counts epochs:

    time(bucket, k) = (k + u) * period        period = rows of a global micro-batch / rows of the length
                                              u in [0, 1): drawn from (seed, bucket, k)

Micro-batch m of the run is the one with the m-th smallest time. So the streams finish their epochs together, within one
micro-batch each, every stretch of the run has the lengths in the shares that the data has, and the seed decides which
comes first. Both directions take a few comparisons: no order of an epoch is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import floor

import numpy as np

from headrace.workers.data.config import DataConfig, bucket_batch
from headrace.workers.data.index import RowNumbers, RowSplit, StepIndex, mix
from headrace.workers.data.prepared import PreparedData
from headrace.workers.train.config import TrainConfig

_DRAW_BITS = 32


@dataclass(frozen=True)
class Turn:
    """One micro-batch of the run: number `number` of the stream of bucket `bucket`."""

    bucket: int
    number: int


@dataclass(frozen=True)
class BucketIndex:
    """The index function of a run with rows of several lengths.

    Args:
        streams: of every length, ascending, each with one micro-batch per step: "step" k of it is its k-th micro-batch.
            Seed, ranks and eval_fraction are the same in all.
        micro_batches: per step.
        batch_size: rows of the longest length in a micro-batch of one rank.
    """

    streams: tuple[StepIndex, ...]
    micro_batches: int
    batch_size: int

    @property
    def seed(self) -> int:
        """Of the shuffle."""
        return self.streams[-1].seed

    @property
    def world_size(self) -> int:
        """Ranks that read different rows."""
        return self.streams[-1].world_size

    @property
    def eval_fraction(self) -> float:
        """Share of the rows held out, of every length."""
        return self.streams[-1].eval_fraction

    @property
    def num_eval(self) -> int:
        """Rows held out."""
        return sum(stream.num_eval for stream in self.streams)

    @property
    def global_batch(self) -> int:
        """Rows of a step over all ranks, if all are of the longest length."""
        return self.world_size * self.batch_size * self.micro_batches

    @property
    def epoch_rows(self) -> int:
        """Rows of an epoch."""
        return sum(stream.epoch_rows for stream in self.streams)

    def shares(self) -> list[float]:
        """Of every length, the share of all micro-batches in the long run."""
        return [float(rate / self._rate) for rate in self._rates]

    def epoch_of(self, step: int) -> float:
        """Epochs read when `step` begins, with the fraction."""
        return float(step * self.micro_batches / self._rate)

    def turns(self, step: int) -> list[Turn]:
        """The micro-batches of a step, in order."""
        return [self.turn(step * self.micro_batches + i) for i in range(self.micro_batches)]

    def turn(self, number: int) -> Turn:
        """Which micro-batch is number `number` of the run."""
        # A stream is never more than one micro-batch ahead of or behind its rate, so `number` is near number / rate.
        slack = len(self.streams)
        begin, end = (max(Fraction(0), (number + 1 - slack) / self._rate), (number + slack) / self._rate)
        found, passed = [], 0
        for bucket, rate in enumerate(self._rates):
            if rate:
                first = self._num_before(bucket, begin)
                passed += first
                found += [(self._time(bucket, k), Turn(bucket, k)) for k in range(first, floor(end * rate) + 1)]
        found.sort(key=lambda pair: (pair[0], pair[1].bucket))
        return found[number - passed][1]

    def num_in_step(self, bucket: int) -> int:
        """Micro-batches of a length in step 0."""
        return sum(turn.bucket == bucket for turn in self.turns(0))

    def global_rows(self, step: int) -> list[RowNumbers]:
        """Rows of `step`: of every micro-batch int64 of shape (world_size, rows of a rank)."""
        return [self.streams[turn.bucket].global_rows(turn.number)[0] for turn in self.turns(step)]

    def rank_rows(self, step: int, rank: int) -> list[RowNumbers]:
        """Rows that `rank` reads in `step`: of every micro-batch int64 of shape (rows of a rank,)."""
        return [self.streams[turn.bucket].rank_rows(turn.number, rank)[0] for turn in self.turns(step)]

    def evaluation(self, num: int) -> BucketIndex:
        """Of `num` held-out micro-batches, in an order that depends on nothing but the data: those of step 0."""
        streams = tuple(replace(stream, seed=0, held_out=True) for stream in self.streams)
        return BucketIndex(streams, num, self.batch_size)

    @cached_property
    def _rates(self) -> list[Fraction]:
        """Micro-batches of every length in an epoch."""
        return [Fraction(stream.epoch_rows, stream.global_batch) for stream in self.streams]

    @cached_property
    def _rate(self) -> Fraction:
        return sum(self._rates, Fraction(0))

    def _time(self, bucket: int, number: int) -> Fraction:
        words = np.array([self.seed & ((1 << 64) - 1), bucket, number], dtype=np.uint64)
        state = np.zeros(1, dtype=np.uint64)
        for word in words:
            state = mix(state ^ word)
        draw = Fraction(int(state[0]) >> (64 - _DRAW_BITS), 1 << _DRAW_BITS)
        return (number + draw) / self._rates[bucket]

    def _num_before(self, bucket: int, time: Fraction) -> int:
        """Micro-batches of a stream whose time is before `time`."""
        number = floor(time * self._rates[bucket])
        return number + (self._time(bucket, number) < time)


def index_of(
    data: PreparedData, config: DataConfig, train: TrainConfig, world_size: int, *, held_out: bool = False
) -> StepIndex | BucketIndex:
    """The index function of a run over prepared data.

    Args:
        train: seed, batch_size and micro_batches count here.
        world_size: degree of the data axis.
        held_out: step through the held-out rows.
    """
    streams = tuple(
        StepIndex(
            RowSplit(array.num_rows, config.eval_fraction),
            seed=train.seed,
            world_size=world_size,
            batch_size=bucket_batch(train.batch_size, data.seq_len, array.seq_len),
            micro_batches=1 if data.buckets else train.micro_batches,
            held_out=held_out,
            first_row=array.first_row,
        )
        for array in data.arrays
    )
    return BucketIndex(streams, train.micro_batches, train.batch_size) if data.buckets else streams[0]
