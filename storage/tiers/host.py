"""Host memory: one shared slab per node, and the part of it that a rank maps."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.storage.core.errors import MachineError
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Lease, Medium
from headrace.storage.integrity import Checksum, digest, verify
from headrace.storage.tier import Move, Tier
from headrace.storage.tiers.memory_limits import available_memory
from headrace.storage.tiers.slab import LEASE_ALIGNMENT, Slab
from headrace.storage.tiers.sweep import create_slab_file, slab_name, sweep_folder
from headrace.storage.transfer import GIB, DeviceCopies

SHM = Path("/dev/shm")
PART_BYTES = 8 * 1024**2
TOUCH_BYTES = 256 * 1024**2


class HostSlab(Slab):
    """The node's host memory for offloaded blobs.

    A file of /dev/shm where that is large enough (its default cap is half of memory), else a memfd, which has no such
    cap and which processes of the same user open as /proc/PID/fd/N. Every page is touched at start, by all cores: the
    memory is there before the first step, or the start fails. Slabs of dead runs are removed first.

    Args:
        num_bytes: rounded up to whole pages; 0 makes an empty slab.
        run_id: goes into the file's name.
        shm: the shared-memory file system.

    Raises:
        MachineError: the machine, or a control group, has less memory than asked for.
    """

    def __init__(self, num_bytes: int, *, run_id: str, shm: Path = SHM) -> None:
        sweep_folder(shm)
        num_bytes = round_up(num_bytes, LEASE_ALIGNMENT)
        limit = available_memory()
        if num_bytes > limit.available_bytes:
            raise MachineError(_message(num_bytes, limit.available_bytes, limit.source))
        files = []
        if shm.is_dir() and _free_bytes(shm) >= num_bytes:
            files = [shm / slab_name(run_id)]
            fd, path = create_slab_file(files[0]), str(files[0])
        else:
            fd = os.memfd_create(slab_name(run_id), os.MFD_CLOEXEC)
            path = f"/proc/{os.getpid()}/fd/{fd}"
        super().__init__(Medium.host, num_bytes, path, fds=[fd], files=files)
        self.is_memfd = not files
        try:
            _fill(fd, num_bytes)
        except OSError as error:
            self.close()
            raise MachineError(_message(num_bytes, limit.available_bytes, f"{path}: {error.strerror}")) from error


class HostTier(Tier):
    """A rank's lease of the host slab, mapped, and on CUDA page-locked once.

    On CUDA a whole blob is copied by one asynchronous DMA launched by the caller; the I/O threads only sum its bytes.
    On CPU the I/O threads copy.

    Args:
        lease: of medium host.
        copies: of the rank's device.

    Raises:
        MachineError: the file of the lease is gone, or the driver refuses to page-lock it.
    """

    def __init__(self, lease: Lease, copies: DeviceCopies, checksum: Checksum) -> None:
        super().__init__(Medium.host, lease.num_bytes, PART_BYTES, checksum)
        self._copies = copies
        self._path = lease.path
        self._bytes: torch.Tensor | None = _map(lease)
        copies.register(self._bytes, "host")

    def begin_store(self, move: Move) -> None:
        """On CUDA, launch the copy of the whole blob."""
        if self._copies.asynchronous and move.blob.num_bytes:
            slot = self._range(move.blob.offset_bytes, move.blob.num_bytes)
            move.copied = self._copies.to_host(slot, move.data, [move.ready])

    def store_part(self, move: Move, part: int) -> None:
        """Copy the part (on CUDA: wait for the copy) and sum it in the slab."""
        begin, end = self.part_range(move.blob, part)
        slot = self._range(move.blob.offset_bytes + begin, end - begin)
        if self._copies.asynchronous:
            move.span_s = self._copies.wait(move.copied)
        else:
            self._copies.to_host(slot, move.data[begin:end], [])
        move.blob.digests[part] = digest(self.checksum, slot)

    def begin_load(self, move: Move) -> None:
        """On CUDA, launch the copy of the whole blob.

        It follows the copy that brought the blob here, because `ready` is a point of the caller's stream, and the stack
        has ordered that stream after every store that is complete.
        """
        if self._copies.asynchronous and move.blob.num_bytes:
            slot = self._range(move.blob.offset_bytes, move.blob.num_bytes)
            move.copied = self._copies.to_device(move.data, slot, [move.ready])

    def load_part(self, move: Move, part: int) -> None:
        """Copy the part and check it: what the caller gets on CPU, what the DMA reads on CUDA."""
        begin, end = self.part_range(move.blob, part)
        slot = self._range(move.blob.offset_bytes + begin, end - begin)
        if not self._copies.asynchronous:
            self._copies.to_device(move.data[begin:end], slot, [])
            slot = move.data[begin:end]
        verify(self.checksum, slot, move.blob.digests[part], f"{move.blob.label} in host memory")

    def record(self) -> dict[str, Any]:
        """Where the memory is and whether it is page-locked."""
        return {
            "path": self._path,
            "capacity_bytes": self.capacity_bytes,
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


def _map(lease: Lease) -> torch.Tensor:
    if lease.num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        fd = os.open(lease.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError(
            f"host tier: the slab {lease.path} cannot be opened ({error.strerror}); its owner has ended, or runs as "
            "another user"
        ) from error
    try:
        memory = mmap.mmap(fd, lease.num_bytes, offset=lease.offset_bytes)
    except (OSError, ValueError) as error:
        raise MachineError(
            f"host tier: bytes {lease.offset_bytes} to {lease.offset_bytes + lease.num_bytes} of {lease.path} cannot "
            f"be mapped: {error}"
        ) from error
    finally:
        os.close(fd)
    # The mapping lives as long as the tensor: torch holds the buffer, and the last reference unmaps it.
    return torch.frombuffer(memory, dtype=torch.uint8)


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _fill(fd: int, num_bytes: int) -> None:
    """Reserve the pages, so that a lack is an error here and not a SIGBUS in a step; then touch them on all cores."""
    if num_bytes == 0:
        return
    os.posix_fallocate(fd, 0, num_bytes)
    with mmap.mmap(fd, num_bytes) as memory, ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda piece: _touch(memory, *piece), _pieces(num_bytes)))


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, num_bytes, TOUCH_BYTES):
        yield begin, min(TOUCH_BYTES, num_bytes - begin)


def _touch(memory: mmap.mmap, begin: int, num_bytes: int) -> None:
    np.frombuffer(memory, dtype=np.uint8, count=num_bytes, offset=begin)[:: mmap.PAGESIZE] = 0


def _message(wanted: int, there: int, source: str) -> str:
    return (
        f"host tier: {wanted / GIB:.2f} GiB wanted, {there / GIB:.2f} GiB there by {source}; lower "
        "tiers.host.budget_gib (0 switches the tier off), give the container more memory, or close other programs"
    )
