"""Values that cross the storage layer's boundaries. No torch; all of it can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Medium(StrEnum):
    """Where bytes can be stored."""

    hbm = "hbm"
    host = "host"
    ssd = "ssd"


class LookupResult(StrEnum):
    """The state of a key in a tier stack."""

    miss = "miss"
    hit = "hit"
    pending = "pending"


class Direction(StrEnum):
    """Which way bytes went, seen from the device."""

    store = "store"
    load = "load"


@dataclass(frozen=True)
class Lease:
    """A range of a node-wide slab lent to one rank. Messages carry this, never the bytes.

    Args:
        lease_id: unique within its owner.
        holder: who holds it, for example "rank3".
        medium: host (memory to map) or ssd (a slab file to pread / pwrite).
        path: file to open: /proc/PID/fd/N of the owner, for the file has no name.
        offset_bytes: start of the range, a multiple of 4096: in that file, or in the address space that several
            files make together.
        num_bytes: length of the range, a multiple of 4096.
        direct: ssd only: whether the file is to be opened with O_DIRECT (measured by the owner).
        more_paths: ssd only: further files, one per drive. Stripes of `stripe_bytes` go to the files in turn.
        stripe_bytes: of one stripe; 0 where there is one file.
        direct_why: ssd only: how the owner came to `direct`.
        folders: ssd only: the folder that each file lies in, by which errors and records call it.
    """

    lease_id: int
    holder: str
    medium: Medium
    path: str
    offset_bytes: int
    num_bytes: int
    direct: bool = False
    more_paths: tuple[str, ...] = ()
    stripe_bytes: int = 0
    direct_why: str = ""
    folders: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the range, in stripe order."""
        return (self.path, *self.more_paths)

    @property
    def names(self) -> tuple[str, ...]:
        """What people call the files, in stripe order."""
        return tuple(f"the slab file in {folder}" for folder in self.folders) or self.paths


@dataclass(frozen=True)
class TransferRecord:
    """One finished move. Times are seconds of one monotonic clock per process (time.perf_counter)."""

    key: str
    num_bytes: int
    tier: Medium
    direction: Direction
    submit_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True)
class TierStats:
    """Occupancy and traffic of one tier since its creation (bytes; seconds of wall time with I/O in flight).

    Args:
        peak_bytes_by_tensor: peak of every tensor by itself, by the name of its blobs; at different moments.
    """

    medium: Medium
    capacity_bytes: int
    used_bytes: int
    peak_bytes: int
    stored_bytes: int
    loaded_bytes: int
    store_busy_s: float
    load_busy_s: float
    peak_bytes_by_tensor: Mapping[str, int] = field(default_factory=dict)
