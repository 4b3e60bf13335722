"""Token rows of several lengths: one reader per length, read in the order of the run."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.workers.data.bucket_index import BucketIndex
from headrace.workers.data.row_reader import RowReader, Rows


class BucketReader:
    """Reads the micro-batches of a step from the readers of their lengths.

    Args:
        readers: bucket -> reader whose "step" is the number of a micro-batch of that length.
        repeat: every step is step 0 again; the readers' numbers go on.
    """

    def __init__(self, index: BucketIndex, readers: Mapping[int, RowReader], *, repeat: bool = False) -> None:
        self._index, self._readers, self._repeat = index, readers, repeat

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`; any step, the next one fastest."""
        found = []
        for turn in self._index.turns(0 if self._repeat else step):
            number = turn.number
            if self._repeat:
                number += step * self._index.num_in_step(turn.bucket)
            found += self._readers[turn.bucket].read(number)
        return found

    def close(self) -> None:
        """Let go of files and threads; may be called twice."""
        for reader in self._readers.values():
            reader.close()
