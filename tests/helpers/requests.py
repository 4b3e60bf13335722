"""The requests of a step for memory, recorded on CPU: every storage that an operation makes, from birth to death."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from headrace.helpers.live_bytes import LiveBytes
from headrace.workers.memory.addresses import Request


class RecordedRequests(LiveBytes):
    """LiveBytes that remembers when each storage was made and freed; time counts these events.

    Args:
        apart: tensors that do not count, as in LiveBytes.

    Attributes:
        marks: times at which `mark` was called.
    """

    def __init__(self, apart: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(apart)
        self.marks: list[int] = []
        self._clock = 0
        self._spans: list[list[int]] = []
        self._number: dict[int, int] = {}

    @property
    def requests(self) -> list[Request]:
        """In the order of their begin; those that are still alive end now."""
        return [Request(num_bytes, begin, end if end >= 0 else self._clock) for num_bytes, begin, end in self._spans]

    def mark(self) -> None:
        """Something begins now: a block."""
        self.marks.append(self._clock)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and storage.nbytes():
            self._number[key] = len(self._spans)
            self._spans.append([storage.nbytes(), self._clock, -1])
            self._clock += 1
        super()._count(storage)

    def _forget(self, key: int, num_bytes: int) -> None:
        super()._forget(key, num_bytes)
        number = self._number.pop(key, None)
        if number is not None:
            self._spans[number][2] = self._clock
            self._clock += 1
