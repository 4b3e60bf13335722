"""A drive: one preallocated slab file per node, and a rank's part of it read and written through a staging ring."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from headrace.storage.blockio.direct_file import BlockFile, probe_direct
from headrace.storage.core.errors import MachineError
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum, digest, verify
from headrace.storage.tier import Move, Tier
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.sweep import create_slab_file, note_slab, slab_name, sweep_folder, sweep_notes
from headrace.storage.transfer import GIB, DeviceCopies, StagingRing

PART_BYTES = 4 * 1024**2


class SsdSlab(Slab):
    """The node's file for offloaded blobs on one file system: allocated whole at start, its blocks reused every step.

    Whether the file system takes O_DIRECT is tried, not assumed; `direct` and `direct_why` hold the answer. Files of
    dead runs are removed first.

    Args:
        folder: made if it is not there.
        num_bytes: the quota; rounded up to whole blocks.
        run_id: goes into the file's name.

    Raises:
        MachineError: the folder cannot be written, or the file system has less room than asked for.
    """

    def __init__(self, folder: Path | str, num_bytes: int, *, run_id: str) -> None:
        folder = Path(folder).absolute()
        num_bytes = round_up(num_bytes, LEASE_ALIGNMENT)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_notes()
            sweep_folder(folder)
            probe = probe_direct(folder)
            space = os.statvfs(folder)
        except OSError as error:
            raise MachineError(
                f"ssd tier: {folder} cannot be used ({error.strerror}); set tiers.ssd.path to a writable folder on a "
                "local drive"
            ) from error
        there = space.f_bavail * space.f_frsize
        if num_bytes > there:
            raise MachineError(_message(folder, num_bytes, there, "free space"))
        self.direct_why = probe.why
        file = folder / slab_name(run_id)
        note = note_slab(file)
        fd = create_slab_file(file)
        files = [file] if note is None else [file, note]
        super().__init__(Medium.ssd, num_bytes, str(file), fds=[fd], files=files, direct=probe.direct)
        try:
            if num_bytes:
                os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            self.close()
            raise MachineError(_message(folder, num_bytes, there, f"{error.strerror}, free space")) from error


class SsdTier(Tier):
    """A rank's lease of a slab file, moved by I/O threads through a staging ring.

    The same code is both host engines: `posix` on CPU, where a part is copied into the ring by memcpy; `ring` on CUDA,
    where the ring is page-locked and a side stream copies into it. The ring exists because O_DIRECT wants page-aligned
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
        super().__init__(Medium.ssd, capacity_bytes, ring.num_bytes, checksum)
        self._file = file
        self._base_bytes = base_bytes
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
            label = f"{move.blob.label} in {self._file.path} at offset {position}"
            verify(self.checksum, staged, move.blob.digests[part], label)
            # The buffer goes back to the ring: the copy out of it must be over.
            self._copies.wait(self._copies.to_device(move.data[begin:end], staged, [move.ready]))

    def record(self) -> dict[str, Any]:
        """Which file, and how its bytes travel."""
        return {
            "path": self._file.path,
            "capacity_bytes": self.capacity_bytes,
            "direct": getattr(self._file, "direct", None),
            "part_bytes": self.part_bytes,
            "checksum": self.checksum.value,
        }

    def close(self) -> None:
        """Close the file and give the ring back; may be called twice."""
        if not self._closed:
            self._closed = True
            self._file.close()
            self._ring.close()

    def _position(self, move: Move, begin: int) -> int:
        return self._base_bytes + move.blob.offset_bytes + begin


def _message(folder: Path, wanted: int, there: int, source: str) -> str:
    return (
        f"ssd tier: {wanted / GIB:.2f} GiB wanted, {there / GIB:.2f} GiB there by {source} of {folder}; lower "
        "tiers.ssd.budget_gib (0 switches the tier off) or set tiers.ssd.path to a larger drive"
    )
