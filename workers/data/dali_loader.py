"""Token rows through NVIDIA DALI: its threads read ahead of the training loop.

A CPU pipeline (no device, no driver needed) reads rows as regions of the two .npy files. Its one Python part is the
index function, called in this process when a run is scheduled, so nothing is forked and nothing is pickled. A pipeline
goes forward only; another step than the next one builds a new pipeline there, which takes about a millisecond.

What was measured of DALI 2.4, and holds this in shape: regions are addressed with 32-bit numbers and 1-D files beyond
2^31 elements return wrong data, hence rows of a 2-D file; without its memory map the reader loads the whole file for
every row; its torch interface has no uint16, so NumPy is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.storage.core.errors import InputError
from headrace.workers.data.index import RowNumbers
from headrace.workers.data.prepared import RowArrays
from headrace.workers.data.row_reader import BeforeRead, Rows, nothing_before

_PREFETCH_BATCHES = 2


class DaliReader:
    """Reads the rows of a step by number.

    Args:
        data: the rows of one length.
        rows_of: step -> (micro_batches, batch_size) row numbers; pure.
        before_read: called with a step before its rows are read, which is ahead of `read`; on the thread that reads.

    Raises:
        InputError: DALI is not installed, or the data has 2^31 rows or more.
    """

    def __init__(
        self, data: RowArrays, rows_of: Callable[[int], RowNumbers], before_read: BeforeRead = nothing_before
    ) -> None:
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"data.loader=dali: nvidia-dali cannot be imported ({error}); install it, or set data.loader=memmap "
                "(the same batches)"
            ) from error
        if data.num_rows > np.iinfo(np.int32).max:
            raise InputError(
                f"{data.tokens_path}: {data.num_rows} rows, DALI counts to 2^31 - 1; set data.loader=memmap"
            )
        self._data, self._rows_of, self._before_read = data, rows_of, before_read
        self._num_micro_batches, self._batch_size = rows_of(0).shape
        self._pipeline: Any = None
        self._next_step = -1

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`, as copies. The step after the last one read is being read already."""
        if self._pipeline is None or step != self._next_step:
            self.close()
            self._pipeline = self._build(step)
        self._next_step = step + 1
        return [self._next(rows) for rows in self._rows_of(step)]

    def _next(self, rows: RowNumbers) -> Rows:
        # as_array copies: (B, 1, columns) out of a buffer that a later run overwrites.
        tokens, flags = (output.as_array()[:, 0] for output in self._pipeline.run())
        return Rows(rows, tokens, flags)

    def _build(self, first_step: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        def row_numbers(info: Any) -> npt.NDArray[np.int32]:
            step, micro_batch = divmod(info.iteration, self._num_micro_batches)
            self._before_read(first_step + step)
            rows = self._rows_of(first_step + step)[micro_batch] - self._data.first_row
            return rows.astype(np.int32)[:, None]

        pipeline = Pipeline(
            batch_size=self._batch_size, num_threads=1, device_id=None, prefetch_queue_depth=_PREFETCH_BATCHES, seed=0
        )
        with pipeline:
            start = fn.external_source(
                source=row_numbers, batch=True, batch_info=True, dtype=types.DALIDataType.INT32, ndim=1
            )
            pipeline.set_outputs(
                *(
                    # The reader goes through its list of files sample by sample: one entry for each row of a batch.
                    fn.readers.numpy(
                        device="cpu",
                        files=[str(path)] * self._batch_size,
                        roi_start=start,
                        roi_shape=[1],
                        roi_axes=[0],
                        cache_header_information=True,
                    )
                    for path in (self._data.tokens_path, self._data.flags_path)
                )
            )
        pipeline.build()
        return pipeline

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        if self._pipeline is not None:
            self._pipeline._shutdown()  # what its finaliser calls; waiting for that would keep the threads
            self._pipeline = None
