"""Token rows through NumPy memory maps: the page cache is the prefetcher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.workers.data.index import RowNumbers
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.row_reader import BeforeRead, Rows, nothing_before


class MemmapReader:
    """Reads the rows of a step by number.

    Args:
        data: the prepared folder.
        rows_of: step -> (micro_batches, batch_size) row numbers.
        before_read: called with a step before its rows are read, on this thread.
    """

    def __init__(
        self, data: PreparedData, rows_of: Callable[[int], RowNumbers], before_read: BeforeRead = nothing_before
    ) -> None:
        self._rows_of, self._before_read = rows_of, before_read
        self._tokens = np.load(data.tokens_path, mmap_mode="r")
        self._flags = np.load(data.flags_path, mmap_mode="r")

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`, as copies."""
        self._before_read(step)
        return [Rows(rows, self._tokens[rows], self._flags[rows]) for rows in self._rows_of(step)]

    def close(self) -> None:
        """Unmap the files; may be called twice."""
        self._tokens = self._flags = np.empty((0, 0), dtype=np.uint8)
