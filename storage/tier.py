"""What a tier must do. A tier moves the parts of blobs; it keeps no table and starts no thread: the stack does both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum
from headrace.storage.transfer import Fence


@dataclass
class Blob:
    """The bytes of one blob as a tier keeps them.

    Args:
        label: the key as text, for errors.
        offset_bytes: of its slot within the tier's range.
        num_bytes: exact; the slot may be longer.
        digests: checksum per part, made at store.
    """

    label: str
    offset_bytes: int
    num_bytes: int
    digests: dict[int, int] = field(default_factory=dict)


@dataclass
class Move:
    """One blob on its way into a tier or out of it.

    Args:
        data: (num_bytes,) uint8 view of the source or target tensor on the device.
        ready: what must be over on the device before `data` may be touched.
        after: device copies that must be over before the slot may be touched: of the bytes that lay there before, or of
            these bytes on their way in. The caller's stream need not be ordered after them: it may be another one now.
        copied: the device copy of the whole blob, where one was launched up front.
        span_s: begin and end of that copy on time.perf_counter, once known.
    """

    blob: Blob
    data: torch.Tensor
    ready: Fence | None
    after: Sequence[Fence] = ()
    copied: Fence | None = None
    span_s: tuple[float, float] | None = None


class Tier(ABC):
    """One medium of one rank: a byte range of `capacity_bytes` that takes and gives back blobs in parts.

    Args:
        medium: which one.
        capacity_bytes: of the range.
        part_bytes: blobs are cut at multiples of this, counted in the address space of the node's slab, so that no part
            crosses the border of a drive's stripe; parts move on several threads.
        checksum: how a part is summed.
        base_bytes: where the range starts in the slab's address space.
    """

    def __init__(
        self, medium: Medium, capacity_bytes: int, part_bytes: int, checksum: Checksum, *, base_bytes: int = 0
    ) -> None:
        self.medium = medium
        self.capacity_bytes = capacity_bytes
        self.part_bytes = part_bytes
        self.checksum = checksum
        self.base_bytes = base_bytes

    def num_parts(self, blob: Blob) -> int:
        """How many parts a blob has; none where it has no bytes."""
        start = self.base_bytes + blob.offset_bytes
        return -(-(start + blob.num_bytes) // self.part_bytes) - start // self.part_bytes if blob.num_bytes else 0

    def part_range(self, blob: Blob, part: int) -> tuple[int, int]:
        """First and past-the-last byte of a part, within the blob. The first byte is a multiple of 4096."""
        start = self.base_bytes + blob.offset_bytes
        begin = (start // self.part_bytes + part) * self.part_bytes - start
        return max(0, begin), min(begin + self.part_bytes, blob.num_bytes)

    @abstractmethod
    def begin_store(self, move: Move) -> None:
        """On the caller's thread, before the parts: launch what can be launched without waiting."""

    @abstractmethod
    def store_part(self, move: Move, part: int) -> None:
        """On an I/O thread: bring one part into the tier and note its checksum.

        Raises:
            TransferFailed: the bytes did not get there.
        """

    @abstractmethod
    def begin_load(self, move: Move) -> None:
        """On the caller's thread, before the parts: launch what can be launched without waiting."""

    @abstractmethod
    def load_part(self, move: Move, part: int) -> None:
        """On an I/O thread: bring one part back, whole and with the checksum it was stored with.

        Raises:
            TransferFailed: it is not.
        """

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """JSON-able facts about how bytes travel here, for the run's record."""

    @abstractmethod
    def close(self) -> None:
        """Unmap and close; may be called twice."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view of a contiguous tensor without gradient. Shape (nbytes,)."""
    return tensor.reshape(-1).view(torch.uint8)
