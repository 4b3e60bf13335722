"""What every reader of token rows does, whichever library reads. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.workers.data.index import RowNumbers


@dataclass(frozen=True)
class Rows:
    """Rows as stored: numbers (B,), tokens (B, seq_len + 1), flags (B, seq_len + 1)."""

    numbers: RowNumbers
    tokens: npt.NDArray[np.integer[Any]]
    flags: npt.NDArray[np.uint8]


BeforeRead = Callable[[int], None]


def nothing_before(step: int) -> None:
    """The BeforeRead of rows that are all here."""


class RowReader(Protocol):
    """Who fetches the rows of a step."""

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`; any step, the next one fastest."""
        ...

    def close(self) -> None:
        """Let go of files and threads; may be called twice."""
        ...
