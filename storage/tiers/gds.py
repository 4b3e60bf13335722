"""GPUDirect Storage: device memory to drive and back without host memory between, through KvikIO and cuFile.

Only ever opened after `probe_gds` has seen it be real: both KvikIO and cuFile have compatibility modes that do the
same calls through host memory, and neither says so on its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Lease, Medium
from headrace.storage.core.stripes import locate
from headrace.storage.integrity import Checksum, digest, verify
from headrace.storage.tier import Move, Tier
from headrace.storage.transfer import CudaCopies

# One part is one cuFile call: larger parts spare calls (kvikio issue 598), smaller ones share threads better.
PART_BYTES = 64 * 1024**2
PROBE_BYTES = 1024**2
NVIDIA_FS_STATS = Path("/proc/driver/nvidia-fs/stats")


class GdsTier(Tier):
    """A rank's lease of a slab file, read and written straight from device memory.

    Every call runs on a side stream of its I/O thread, behind the event that says the bytes are computed. With a
    cuFile configuration the call is stream-ordered; without one KvikIO waits for that stream and moves the bytes before
    it returns. Either way the I/O thread waits and the compute stream does not. (KvikIO's plain pread and pwrite
    would wait for the whole legacy default stream, where torch computes.)

    Args:
        lease: of medium ssd.
        copies: of the rank's GPU.
        checksum: xor_64, summed on the device, or none.
    """

    def __init__(self, lease: Lease, copies: CudaCopies, checksum: Checksum) -> None:
        part_bytes = lease.stripe_bytes or PART_BYTES
        super().__init__(Medium.ssd, lease.num_bytes, part_bytes, checksum, base_bytes=lease.offset_bytes)
        self._lease = lease
        self._copies = copies
        self._files: list[Any] = [_open(path) for path in lease.paths]
        self._writes_at_open = count_writes(NVIDIA_FS_STATS.read_text()) if NVIDIA_FS_STATS.exists() else None

    def begin_store(self, move: Move) -> None:
        """Nothing: the I/O threads launch the calls."""

    def store_part(self, move: Move, part: int) -> None:
        """Sum on the device, then one cuFile write."""
        begin, end = self.part_range(move.blob, part)
        data = move.data[begin:end]
        with self._copies.thread_stream([move.ready]) as stream:
            move.blob.digests[part] = digest(self.checksum, data)
            self._call("raw_write_async", move, begin, data, stream)

    def begin_load(self, move: Move) -> None:
        """Nothing: the I/O threads launch the calls."""

    def load_part(self, move: Move, part: int) -> None:
        """One cuFile read, then the check on the device."""
        begin, end = self.part_range(move.blob, part)
        data = move.data[begin:end]
        with self._copies.thread_stream([move.ready]) as stream:
            self._call("raw_read_async", move, begin, data, stream)
            verify(self.checksum, data, move.blob.digests[part], f"{move.blob.label} in {self._where(move, begin)[0]}")

    def record(self) -> dict[str, Any]:
        """Which file, and how its bytes travel."""
        return {
            "paths": list(self._lease.names),
            "capacity_bytes": self.capacity_bytes,
            "direct": True,
            "part_bytes": self.part_bytes,
            "checksum": self.checksum.value,
            "proof": self._proof(),
        }

    def _proof(self) -> str:
        """How it is known which way the bytes went: the driver counts its own transfers, of all processes together."""
        now = count_writes(NVIDIA_FS_STATS.read_text()) if NVIDIA_FS_STATS.exists() else None
        if now is None or self._writes_at_open is None:
            return "nvidia-fs does not count its transfers any more"
        return f"nvidia-fs has counted {now - self._writes_at_open} writes since the tier was opened"

    def close(self) -> None:
        """Deregister and close the files; may be called twice."""
        files, self._files = self._files, []
        for file in files:
            file.close()

    def _call(self, verb: str, move: Move, begin: int, data: torch.Tensor, stream: torch.cuda.Stream) -> None:
        path, position, file = self._where(move, begin)
        try:
            future = getattr(file, verb)(data, stream.cuda_stream, data.numel(), position)
            moved = future.check_bytes_done()
        except RuntimeError as error:
            raise TransferFailed(f"{move.blob.label}: {verb} of {path} at offset {position} failed: {error}") from error
        if moved != data.numel():
            raise TransferFailed(
                f"{move.blob.label}: {verb} of {path} at offset {position} moved {moved} of {data.numel()} bytes"
            )

    def _where(self, move: Move, begin: int) -> tuple[str, int, Any]:
        """Path, offset in it, and open file of the part that begins there; a part never crosses a stripe."""
        lease = self._lease
        address = self.base_bytes + move.blob.offset_bytes + begin
        index, offset = locate(address, len(lease.paths), lease.stripe_bytes)
        return lease.names[index], offset, self._files[index]


def probe_gds(lease: Lease, copies: CudaCopies) -> str | None:
    """Try GPUDirect Storage on the lease itself, on each of its drives: None where it is real, else why it is not.

    Real means: nvidia-fs is loaded, KvikIO opens the file with its compatibility mode off, a block written from device
    memory comes back equal, and the driver's own write counter moved. What lay there is written back: a rank before
    this one may have left blobs.
    """
    if not NVIDIA_FS_STATS.exists():
        return f"the nvidia-fs driver is not loaded (no {NVIDIA_FS_STATS})"
    if lease.num_bytes < PROBE_BYTES:
        return f"the lease has {lease.num_bytes} bytes, less than the {PROBE_BYTES} of the probe"
    for path, offset_bytes in _probe_places(lease):
        fault = _probe_file(path, offset_bytes, copies)
        if fault is not None:
            return fault
    return None


def _probe_places(lease: Lease) -> list[tuple[str, int]]:
    """A file and an offset for each drive that the lease has a whole stripe of."""
    if not lease.stripe_bytes:
        return [(lease.path, lease.offset_bytes)]
    first = round_up(lease.offset_bytes, lease.stripe_bytes)
    last = lease.offset_bytes + lease.num_bytes - PROBE_BYTES
    addresses = range(first, last + 1, lease.stripe_bytes)[: len(lease.paths)] or [lease.offset_bytes]
    places = [locate(address, len(lease.paths), lease.stripe_bytes) for address in addresses]
    return [(lease.paths[index], offset_bytes) for index, offset_bytes in places]


def _probe_file(path: str, offset_bytes: int, copies: CudaCopies) -> str | None:
    try:
        file = _open(path)
    except (ImportError, RuntimeError, OSError) as error:
        return f"KvikIO cannot open {path} without its compatibility mode: {error}"
    before = count_writes(NVIDIA_FS_STATS.read_text())
    if before is None:
        file.close()
        return (
            "nvidia-fs does not count its transfers, so nothing proves the path: "
            "echo 1 > /sys/module/nvidia_fs/parameters/rw_stats_enabled"
        )
    try:
        sent = torch.randint(0, 256, (PROBE_BYTES,), dtype=torch.uint8, device=copies.device)
        kept, back = torch.zeros_like(sent), torch.zeros_like(sent)
        with copies.thread_stream([copies.fence()]) as stream:
            file.raw_read_async(kept, stream.cuda_stream, PROBE_BYTES, offset_bytes).check_bytes_done()
            file.raw_write_async(sent, stream.cuda_stream, PROBE_BYTES, offset_bytes).check_bytes_done()
            file.raw_read_async(back, stream.cuda_stream, PROBE_BYTES, offset_bytes).check_bytes_done()
            same = torch.equal(sent, back)
            file.raw_write_async(kept, stream.cuda_stream, PROBE_BYTES, offset_bytes).check_bytes_done()
    except RuntimeError as error:
        return f"the probe's transfer failed: {error}"
    finally:
        file.close()
    if not same:
        return "the probe's bytes came back different"
    after = count_writes(NVIDIA_FS_STATS.read_text())
    if after is None or after <= before:
        return (
            "the write counter of nvidia-fs did not move: cuFile went through host memory (its own compatibility mode)"
        )
    return None


def count_writes(stats: str) -> int | None:
    """Writes that nvidia-fs has done, from the text of its stats file; None where it does not count them."""
    if re.search(r"^IO stats:\s*Disabled", stats, re.MULTILINE):
        return None
    found = re.search(r"^Writes\s*:\s*n=(\d+)", stats, re.MULTILINE)
    return int(found[1]) if found else None


def _open(path: str) -> Any:
    import kvikio
    import kvikio.defaults

    # OFF raises where cuFile cannot take the file. It also raises, on the first stream-ordered call, where there is no
    # cuFile configuration; AUTO does such a call on the thread instead, and opens the file as OFF just did.
    kvikio.defaults.set("compat_mode", kvikio.CompatMode.OFF)
    kvikio.CuFile(path, "r+").close()
    kvikio.defaults.set("compat_mode", kvikio.CompatMode.AUTO)
    return kvikio.CuFile(path, "r+")
