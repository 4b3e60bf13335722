"""A tier that fails on demand, for everybody's tests: the same stack and the same code above it as the real ones.

The faults sit where the system calls are, below the loops over partial transfers and the checksums, so a test shows
what the real tiers do about them.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from headrace.storage.blockio.direct_file import BlockFile
from headrace.storage.blockio.thread_pool import WINDOW_BYTES, IoThreads
from headrace.storage.core.errors import ErrorId, HeadraceError
from headrace.storage.core.records import Medium
from headrace.storage.integrity import Checksum
from headrace.storage.stack import TierStack
from headrace.storage.tiers.ssd import SsdTier
from headrace.storage.transfer import CpuCopies, StagingRing
from headrace.storage.transfer_log import TransferLog


def has_id(id: ErrorId) -> Callable[[BaseException], bool]:
    """A check for `pytest.raises(InputError, check=has_id(ErrorId.input_wrong))`: the error's id, not its sentence."""
    return lambda error: isinstance(error, HeadraceError) and error.id is id


def open_files(below: Path) -> list[str]:
    """Files in a folder that this process has open, also those without a name; other descriptors do not count."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the descriptor that lists the folder
            found.append(os.readlink(link))
    return [path for path in found if path.startswith(f"{below}/")]


@dataclass
class Faults:
    """What goes wrong, from now on; fields may be changed while the tier is in use.

    Args:
        delay_s: every call takes this much longer.
        hang: calls that come while it is not set wait until it is: a drive that does not answer.
        full: writes end in ENOSPC.
        failed_write: writes end in EIO.
        failed_read: reads end in EIO.
        short_read: reads meet the end of the file after half of the bytes.
        bit_flip: one bit of what is read is wrong.
        busy_calls: this many calls end in EAGAIN first.
        eio_calls: this many calls end in EIO first: an error that passes.
        torn_write: writes report success and leave the old bytes in their second half.
        bytes_per_call: a call moves at most this many; None moves all. Not an error, only slow.
    """

    delay_s: float = 0.0
    hang: threading.Event | None = None
    full: bool = False
    failed_write: bool = False
    failed_read: bool = False
    short_read: bool = False
    bit_flip: bool = False
    busy_calls: int = 0
    eio_calls: int = 0
    torn_write: bool = False
    bytes_per_call: int | None = None


class FakeFile(BlockFile):
    """A file in memory with faults.

    Args:
        num_bytes: its size.
        faults: looked at in every call.
    """

    def __init__(self, num_bytes: int, faults: Faults, *, path: str = "/fake/slab") -> None:
        super().__init__(path)
        self.faults = faults
        self.num_calls = 0
        self._content = bytearray(num_bytes)
        self._lock = threading.Lock()

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        """Copy out, as far as the faults allow."""
        self._meet(failed=self.faults.failed_read)
        end = min(offset_bytes + self._limit(len(view)), len(self._content))
        if self.faults.short_read:
            # The file seems to end in the middle of the first view that is asked for.
            end = min(end, offset_bytes + len(view) // 2) if len(view) > 4096 else offset_bytes
        count = max(0, end - offset_bytes)
        view[:count] = self._content[offset_bytes : offset_bytes + count]
        if self.faults.bit_flip and count:
            view[0] ^= 1
        return count

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        """Copy in, as far as the faults allow."""
        self._meet(failed=self.faults.failed_write)
        if self.faults.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self._limit(len(view))
        kept = count // 2 if self.faults.torn_write else count
        self._content[offset_bytes : offset_bytes + kept] = view[:kept]
        return count

    def close(self) -> None:
        """Nothing to release."""

    def _limit(self, wanted: int) -> int:
        return min(wanted, self.faults.bytes_per_call or wanted)

    def _meet(self, *, failed: bool) -> None:
        if self.faults.delay_s:
            time.sleep(self.faults.delay_s)
        hang = self.faults.hang
        if hang is not None:
            hang.wait()
        with self._lock:
            self.num_calls += 1
            if self.faults.busy_calls > 0:
                self.faults.busy_calls -= 1
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            if self.faults.eio_calls > 0:
                self.faults.eio_calls -= 1
                failed = True
        if failed:
            raise OSError(errno.EIO, "Input/output error")


class FakeTier(SsdTier):
    """The drive's tier over a FakeFile.

    Args:
        num_bytes: its capacity.
        faults: see Faults.
        medium: which tier it plays.
        part_bytes: small, so that small test tensors have several parts.
    """

    def __init__(
        self,
        num_bytes: int,
        faults: Faults | None = None,
        *,
        medium: Medium = Medium.ssd,
        part_bytes: int = 16384,
        checksum: Checksum = Checksum.xxh3_64,
    ) -> None:
        self.faults = faults or Faults()
        self.file = FakeFile(num_bytes, self.faults)
        copies = CpuCopies(torch.device("cpu"))
        super().__init__(self.file, 0, num_bytes, StagingRing(4, part_bytes, copies), copies, checksum)
        self.medium = medium


def open_fake_stack(
    tiers: Sequence[FakeTier],
    *,
    log: TransferLog | None = None,
    num_threads: int = 2,
    window_bytes: int = WINDOW_BYTES,
    stall_s: float | None = None,
) -> TierStack:
    """A real TierStack over fake tiers, on CPU."""
    return TierStack(
        tiers,
        copies=CpuCopies(torch.device("cpu")),
        threads={tier.medium: IoThreads(num_threads, window_bytes=window_bytes, stall_s=stall_s) for tier in tiers},
        log=log or TransferLog(),
    )
