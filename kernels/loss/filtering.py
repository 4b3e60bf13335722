"""What gradient filtering left out: the tile keep rate and the vocabulary rows that got no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from headrace.kernels.loss.steps import FILTER_TILE


class FilterSummary(NamedTuple):
    """keep_rate: tiles kept / tiles seen, 1.0 where none was seen. num_starved_rows: vocabulary rows of which no tile
    was kept, among num_rows."""

    keep_rate: float
    num_starved_rows: int
    num_rows: int


class FilterStats:
    """Counts of filtered backward passes; hand one to LossOptions. It adds up until `reset`.

    Reading costs a device sync, adding does not. Where several micro-batches add to one gradient, use one object for
    all: a row is starved when none of them kept a tile of it.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._num_tiles = 0
        self._num_kept: torch.Tensor | None = None
        self._rows_kept: torch.Tensor | None = None

    def add(self, kept: torch.Tensor, rows: slice, vocab_size: int) -> None:
        """Count one block.

        Args:
            kept: bool (token tiles, column tiles) of `block_gradient_`.
            rows: of the (local) weight, which are the block's columns. vocab_size: rows of the (local) weight.

        Raises:
            ValueError: a weight of another size than before.
        """
        if self._rows_kept is None or self._num_kept is None:
            self._rows_kept = torch.zeros(vocab_size, dtype=torch.bool, device=kept.device)
            self._num_kept = torch.zeros((), dtype=torch.int64, device=kept.device)
        if self._rows_kept.shape[0] != vocab_size:
            raise ValueError(
                f"FilterStats: a weight of {vocab_size} rows after one of {self._rows_kept.shape[0]}: "
                "one object counts for one weight"
            )
        self._num_tiles += kept.numel()
        self._num_kept += kept.sum()
        self._rows_kept[rows] |= kept.any(0).repeat_interleave(FILTER_TILE[1])[: rows.stop - rows.start]

    def summary(self, group: dist.ProcessGroup | None = None) -> FilterSummary:
        """The counts; with `group` (vocabulary shards) those of all its ranks together."""
        starved = 0 if self._rows_kept is None else int((~self._rows_kept).sum())
        num_rows = 0 if self._rows_kept is None else self._rows_kept.shape[0]
        kept = 0 if self._num_kept is None else int(self._num_kept)
        counts = [kept, self._num_tiles, starved, num_rows]
        if group is not None:
            device = "cpu" if self._rows_kept is None else self._rows_kept.device
            total = torch.tensor(counts, device=device)
            dist.all_reduce(total, group=group)
            counts = total.tolist()
        kept, num_tiles, starved, num_rows = counts
        return FilterSummary(kept / num_tiles if num_tiles else 1.0, starved, num_rows)
