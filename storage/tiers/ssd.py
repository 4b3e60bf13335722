"""A drive: one preallocated slab file per node, and a rank's part of it read and written through a staging ring."""

from __future__ import annotations

from typing import Any

from headrace.storage.blockio.direct_file import BlockFile
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum, digest, verify
from headrace.storage.tier import Move, Tier
from headrace.storage.transfer import DeviceCopies, StagingRing


class SsdTier(Tier):
    """A rank's lease of a slab file, moved by I/O threads through a staging ring.

    The same code is both host engines: `posix` on CPU, where a part is copied into the ring by memcpy; `ring` on CUDA,
    where the ring is page-locked and a side stream copies into it. The ring exists because O_DIRECT needs page-aligned
    memory and because the drive must never see a tensor that the caller may still change.

    Args:
        file: holds the lease's range.
        base_bytes: where the range starts in the file.
        capacity_bytes: its length.
        ring: at least one buffer per I/O thread; a part is one buffer.
        copies: of the rank's device.
    """

    def __init__(
        self,
        file: BlockFile,
        base_bytes: int,
        capacity_bytes: int,
        ring: StagingRing,
        copies: DeviceCopies,
        checksum: Checksum,
    ) -> None:
        super().__init__(Medium.ssd, capacity_bytes, ring.num_bytes, checksum, base_bytes=base_bytes)
        self._file = file
        self._ring = ring
        self._copies = copies
        self._closed = False

    def begin_store(self, move: Move) -> None:
        """Nothing: a part needs a free buffer of the ring first."""

    def store_part(self, move: Move, part: int) -> None:
        """Device to ring, sum, ring to drive; the tail of the last block is zeros."""
        begin, end = self.part_range(move.blob, part)
        with self._ring.borrow() as buffer:
            staged = buffer[: end - begin]
            self._copies.wait(self._copies.to_host(staged, move.data[begin:end], [move.ready]))
            move.blob.digests[part] = digest(self.checksum, staged)
            padded = buffer[: round_up(end - begin)].numpy()
            padded[end - begin :] = 0
            self._file.write(padded.data, self._position(move, begin), move.blob.label)

    def begin_load(self, move: Move) -> None:
        """Nothing: a part needs a free buffer of the ring first."""

    def load_part(self, move: Move, part: int) -> None:
        """Drive to ring, check, ring to device."""
        begin, end = self.part_range(move.blob, part)
        with self._ring.borrow() as buffer:
            padded = buffer[: round_up(end - begin)].numpy()
            position = self._position(move, begin)
            self._file.read(padded.data, position, move.blob.label)
            staged = buffer[: end - begin]
            label = f"{move.blob.label} in {self._file.where(position)}"
            verify(self.checksum, staged, move.blob.digests[part], label)
            # The buffer goes back to the ring: the copy out of it must be over.
            self._copies.wait(self._copies.to_device(move.data[begin:end], staged, [move.ready]))

    def record(self) -> dict[str, Any]:
        """Which files, how their bytes travel and how that is known, what went through them, and what went wrong."""
        return {
            "path": self._file.path,
            "capacity_bytes": self.capacity_bytes,
            "part_bytes": self.part_bytes,
            "checksum": self.checksum.value,
            **self._file.record(),
            "proof": self._proof(),
        }

    def _proof(self) -> str:
        """How it is known which way the bytes went: what passes the page cache by leaves no page in it."""
        if self._closed:
            return "the tier is closed"
        cached = self._file.resident_bytes(self.base_bytes, self.capacity_bytes)
        there = "an unknown number" if cached is None else str(cached)
        way = "O_DIRECT" if self._file.direct else "through the page cache"
        return f"{way}: {there} of the lease's {self.capacity_bytes} bytes are in the page cache"

    def close(self) -> None:
        """Close the file and give the ring back; may be called twice."""
        if not self._closed:
            self._closed = True
            self._file.close()
            self._ring.close()

    def _position(self, move: Move, begin: int) -> int:
        return self.base_bytes + move.blob.offset_bytes + begin
