"""Token rows through NumPy memory maps: the page cache is the prefetcher."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.workers.data.index import RowNumbers
from headrace.workers.data.prepared import RowArrays
from headrace.workers.data.row_reader import BeforeRead, Rows, nothing_before
from headrace.workers.data.rows import load_rows


class MemmapReader:
    """Reads the rows of a step by number.

    Args:
        data: the rows of one length.
        rows_of: step -> (micro_batches, batch_size) row numbers.
        before_read: called with a step before its rows are read, on this thread.
    """

    def __init__(
        self, data: RowArrays, rows_of: Callable[[int], RowNumbers], before_read: BeforeRead = nothing_before
    ) -> None:
        self._rows_of, self._before_read, self._first = rows_of, before_read, data.first_row
        self._tokens, self._flags = load_rows(data.tokens_path), load_rows(data.flags_path)

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`, as copies."""
        self._before_read(step)
        places = [(rows, rows - self._first) for rows in self._rows_of(step)]
        return [Rows(rows, self._tokens[here], self._flags[here]) for rows, here in places]

    def close(self) -> None:
        """Unmap the files; may be called twice."""
        self._tokens = self._flags = np.empty((0, 0), dtype=np.uint8)
