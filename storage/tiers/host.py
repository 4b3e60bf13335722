"""Host memory: the part of the node's slab that a rank has leased, maps and allocates."""

from __future__ import annotations

import mmap
import os
from dataclasses import asdict
from typing import Any

import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.core.records import Lease, Medium
from headrace.storage.integrity import Checksum, digest, verify
from headrace.storage.tier import Blob, Move, Tier
from headrace.storage.tiers.touch import Touched, touch
from headrace.storage.transfer import DeviceCopies

# Small enough that the second pass over a part finds its bytes in the cache, large enough for few handovers.
PART_BYTES = 4 * 1024**2


class HostTier(Tier):
    """A rank's lease of the host slab, mapped and allocated whole before the first step, and on CUDA page-locked once.

    On CUDA a whole blob is copied by one asynchronous DMA launched by the caller; the I/O threads only sum its bytes.
    On CPU the I/O threads copy.

    Args:
        lease: of medium host.
        copies: of the rank's device.

    Raises:
        MachineError: the file of the lease is gone, the machine has too little memory for it, or the driver refuses to
            page-lock it.
    """

    def __init__(self, lease: Lease, copies: DeviceCopies, checksum: Checksum) -> None:
        super().__init__(Medium.host, lease.num_bytes, PART_BYTES, checksum)
        self._copies = copies
        self._path = lease.path
        self._cores = copies.near_cores()
        memory, self._touched = _map(lease, self._cores)
        self._bytes: torch.Tensor | None = memory
        copies.register(memory, "host")

    def begin_store(self, move: Move) -> None:
        """On CUDA, launch the copy of the whole blob."""
        if self._copies.asynchronous and move.blob.num_bytes:
            slot = self._range(move.blob.offset_bytes, move.blob.num_bytes)
            move.copied = self._copies.to_host(slot, move.data, [move.ready, *move.after])

    def store_part(self, move: Move, part: int) -> None:
        """Sum the part and copy it; on CUDA wait for the copy and sum it in the slab.

        On CPU the source is summed: the copy then reads it from the cache, may write past it (memcpy does so from
        some size on), and what it gets wrong is found at load.
        """
        begin, end = self.part_range(move.blob, part)
        slot = self._range(move.blob.offset_bytes + begin, end - begin)
        if self._copies.asynchronous:
            move.span_s = self._copies.wait(move.copied)
            move.blob.digests[part] = digest(self.checksum, slot)
        else:
            source = move.data[begin:end]
            move.blob.digests[part] = digest(self.checksum, source)
            self._copies.to_host(slot, source, [])

    def begin_load(self, move: Move) -> None:
        """On CUDA, launch the copy of the whole blob."""
        if self._copies.asynchronous and move.blob.num_bytes:
            slot = self._range(move.blob.offset_bytes, move.blob.num_bytes)
            move.copied = self._copies.to_device(move.data, slot, [move.ready, *move.after])

    def load_part(self, move: Move, part: int) -> None:
        """Check the part where it lies; on CPU, copy it then."""
        begin, end = self.part_range(move.blob, part)
        slot = self._range(move.blob.offset_bytes + begin, end - begin)
        verify(self.checksum, slot, move.blob.digests[part], f"{move.blob.label} in host memory")
        if not self._copies.asynchronous:
            self._copies.to_device(move.data[begin:end], slot, [])

    def resident(self, blob: Blob) -> torch.Tensor:
        """The blob's bytes where they lie, (num_bytes,) uint8, compared with their checksums.

        Raises:
            TransferFailed: they changed since they were stored.
        """
        for part in range(self.num_parts(blob)):
            begin, end = self.part_range(blob, part)
            slot = self._range(blob.offset_bytes + begin, end - begin)
            verify(self.checksum, slot, blob.digests[part], f"{blob.label} in host memory")
        return self._range(blob.offset_bytes, blob.num_bytes)

    def record(self) -> dict[str, Any]:
        """Where the memory is and whether it is page-locked."""
        return {
            "path": self._path,
            "capacity_bytes": self.capacity_bytes,
            "touched": asdict(self._touched),
            "touched_on_cores": None if self._cores is None else sorted(self._cores),
            "page_locked": self._copies.asynchronous and self.capacity_bytes > 0,
            "checksum": self.checksum.value,
        }

    def close(self) -> None:
        """Undo the page lock and unmap; may be called twice."""
        memory, self._bytes = self._bytes, None
        if memory is not None:
            self._copies.unregister(memory)

    def _range(self, offset_bytes: int, num_bytes: int) -> torch.Tensor:
        assert self._bytes is not None, "the host tier is closed"
        return self._bytes[offset_bytes : offset_bytes + num_bytes]


def _map(lease: Lease, cores: frozenset[int] | None) -> tuple[torch.Tensor, Touched]:
    """The lease's bytes, (num_bytes,) uint8, every page of them there.

    Page by page, at the first touch, costs several times the copy that touches.
    """
    if lease.num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8), Touched("nothing to touch", 0, 0.0, 0)
    what = f"host tier: bytes {lease.offset_bytes} to {lease.offset_bytes + lease.num_bytes} of the slab {lease.path}"
    try:
        fd = os.open(lease.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError(
            f"host tier: the slab {lease.path} cannot be opened ({error.strerror}); its owner has ended, or runs as "
            "another user"
        ) from error
    try:
        # The mapping lives as long as the tensor: torch holds the buffer, and the last reference unmaps it.
        memory = torch.frombuffer(mmap.mmap(fd, lease.num_bytes, offset=lease.offset_bytes), dtype=torch.uint8)
        return memory, touch(fd, lease.offset_bytes, memory.data_ptr(), lease.num_bytes, cores)
    except ValueError as error:
        raise MachineError(f"{what} cannot be mapped: {error}") from error
    except OSError as error:
        raise MachineError(
            f"{what} cannot be mapped and allocated ({error.strerror}); lower tiers.host.budget_gib, give the "
            "container more memory, or close other programs"
        ) from error
    finally:
        os.close(fd)
