"""The training loader: step number in, micro-batches out.

It has two readers, `dali` and `memmap`. Both call the same index function which rows a step has, so they yield
the same batches, and a run may change from one to the other when it resumes.
"""

from __future__ import annotations

from collections.abc import Callable

from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import TokenBatch, to_batch
from headrace.workers.data.bucket_index import BucketIndex, index_of
from headrace.workers.data.bucket_reader import BucketReader
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.dali_loader import DaliReader
from headrace.workers.data.index import RowNumbers, StepIndex
from headrace.workers.data.memmap_loader import MemmapReader
from headrace.workers.data.mirror import STEPS_AHEAD, MirroredReader, ReadAhead, RowMirror
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepared import PreparedData, RowArrays
from headrace.workers.data.row_reader import BeforeRead, RowReader, nothing_before
from headrace.workers.train.config import TrainConfig

SPLITS = ("train", "eval")
OwnTokens = Callable[[TokenBatch], TokenBatch]


def all_tokens(batch: TokenBatch) -> TokenBatch:
    """The batch itself: no other rank has its rows."""
    return batch


class TokenLoader:
    """This rank's micro-batches of any step.

    Args:
        data: the prepared folder.
        kind: who reads.
        index: which rows a step has over all ranks.
        rank: whose share this is.
        own_tokens: what this rank takes of a micro-batch whose rows it shares with others.

    Raises:
        InputError: the sums of the rows are damaged.
    """

    def __init__(
        self,
        data: PreparedData,
        kind: Loader,
        index: StepIndex | BucketIndex,
        rank: int,
        own_tokens: OwnTokens = all_tokens,
    ) -> None:
        self.data, self.index = data, index
        self._kind, self._rank, self._own_tokens = kind, rank, own_tokens
        self._sums = data.row_sums()
        self._mirror = None if data.url is None else RowMirror(data)
        self._reader = self._open_reader(index)
        self._eval_reader: RowReader | None = None
        self._eval_num = self._eval_calls = 0

    def step_batches(self, step: int) -> list[TokenBatch]:
        """The `micro_batches` micro-batches that this rank reads in optimizer step `step` (0, 1, ...).

        Raises:
            InputError: a row is not what was prepared; names it. Of remote data also: replaced or gone there, or access
                denied. MachineError: its store cannot be reached, or no room for the mirror.
        """
        return self._batches(self._reader, step)

    def eval_batches(self, num: int) -> list[TokenBatch]:
        """The first `num` held-out micro-batches of this rank, the same at every call.

        Over all ranks they are num * world_size * batch_size rows of a fixed order that depends on nothing but the
        data; where the held-out rows are fewer, it starts again from the first. With buckets they are micro-batches of
        all lengths, in the shares of the held-out rows.

        Raises:
            InputError: no rows are held out.
        """
        if num < 1:
            return []
        if self.index.num_eval == 0:
            raise InputError(
                f"data.eval_fraction={self.index.eval_fraction} of {self.data.num_rows} row(s) holds none out "
                "for evaluation; raise it, prepare more data, or set train.eval_every=0"
            )
        if self._eval_reader is None or num != self._eval_num:
            if self._eval_reader is not None:
                self._eval_reader.close()
            # "Step 1" of this reader is the evaluation again: one that reads ahead has it ready.
            one_step = self.index.evaluation(num)
            self._eval_reader, self._eval_num, self._eval_calls = self._open_reader(one_step, repeat=True), num, 0
        self._eval_calls += 1
        return self._batches(self._eval_reader, self._eval_calls - 1)

    def epoch_of(self, step: int) -> float:
        """Passes over the training rows that are done when `step` begins."""
        return self.index.epoch_of(step)

    def close(self) -> None:
        """Let go of files and threads; may be called twice. The loader cannot be used afterwards."""
        if self._mirror is not None:
            self._mirror.stop()
        for reader in (self._reader, self._eval_reader):
            if reader is not None:
                reader.close()
        if self._mirror is not None:
            self._mirror.close()

    def _open_reader(self, index: StepIndex | BucketIndex, *, repeat: bool = False) -> RowReader:
        if isinstance(index, BucketIndex):
            readers = {}
            for place, (stream, share) in enumerate(zip(index.streams, index.shares(), strict=True)):
                if per_epoch := index.num_in_step(place) if repeat else stream.epoch_rows:
                    ahead = max(STEPS_AHEAD, round(STEPS_AHEAD * index.micro_batches * share))
                    array, every = self.data.arrays[place], per_epoch if repeat else None
                    readers[place] = self._open_stream(stream, array, every=every, steps_ahead=ahead)
            return BucketReader(index, readers, repeat=repeat)
        return self._open_stream(index, self.data.arrays[0], every=1 if repeat else None)

    def _open_stream(
        self, index: StepIndex, array: RowArrays, *, every: int | None, steps_ahead: int | None = None
    ) -> RowReader:
        """The reader of the rows of one length; where `every` is given its steps repeat after so many."""

        def rows_of(step: int) -> RowNumbers:
            return index.rank_rows(step if every is None else step % every, self._rank)

        if self._mirror is None:
            return self._reader_of(array, rows_of, nothing_before)
        ahead = ReadAhead(self._mirror, rows_of, steps_ahead)
        return MirroredReader(self._reader_of(array, rows_of, ahead), ahead)

    def _reader_of(self, array: RowArrays, rows_of: Callable[[int], RowNumbers], before_read: BeforeRead) -> RowReader:
        if self._kind is Loader.memmap:
            return MemmapReader(array, rows_of, before_read)
        return DaliReader(array, rows_of, before_read)

    def _batches(self, reader: RowReader, step: int) -> list[TokenBatch]:
        batches = []
        for rows in reader.read(step):
            for row, tokens, flags in zip(rows.numbers, rows.tokens, rows.flags, strict=True):
                self.data.check_row(int(row), tokens, flags, int(self._sums[row]))
            batches.append(self._own_tokens(to_batch(rows.tokens, rows.flags)))
        return batches


def open_loader(
    config: DataConfig,
    *,
    train: TrainConfig,
    rank: int,
    world_size: int,
    split: str = "train",
    own_tokens: OwnTokens = all_tokens,
) -> TokenLoader:
    """Open the prepared folder of a run for one rank.

    Args:
        config: with `prepared` naming an existing folder.
        train: seed, batch_size and micro_batches count here.
        rank, world_size: place on the data axis, and its degree: only these ranks read different rows.
        split: "train", or "eval" to step through the held-out rows.
        own_tokens: as of TokenLoader.

    Raises:
        InputError: no prepared folder, one that does not fit the configuration, or no rows in the split.
    """
    if split not in SPLITS:
        raise InputError(f"split={split!r}: one of {', '.join(SPLITS)}")
    if config.prepared is None:
        raise InputError("data.prepared is not set: prepare the source first (headrace.workers.data.prepare.prepare)")
    for name, value in (("batch_size", train.batch_size), ("micro_batches", train.micro_batches)):
        if value < 1:
            raise InputError(f"train.{name}={value}: at least 1")
    if not 0 <= rank < world_size:
        raise InputError(f"rank {rank} is not in a group of {world_size}")
    data = open_prepared(config.prepared, seq_len=config.seq_len, buckets=config.buckets)
    index = index_of(data, config, train, world_size, held_out=split == "eval")
    if index.epoch_rows < 1:
        raise InputError(f"{data.where}: no row in the {split} split of {data.num_rows} row(s); see data.eval_fraction")
    return TokenLoader(data, config.loader, index, rank, own_tokens)
