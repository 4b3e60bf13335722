"""Whole, aligned reads and writes of one file, O_DIRECT where the file system takes it.

The kernel may move fewer bytes than asked; a blob is whole or it is an error. O_DIRECT needs file offset, length and
memory address in multiples of the block size (4096 here), so a short transfer is continued from its last whole block.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.storage.blockio import page_cache
from headrace.storage.blockio.io_errors import explain, name_of, retries_of
from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.ledger import PAGE_BYTES
from headrace.storage.core.unnamed import open_unnamed, path_of

# A call that moves less than a block is made so often before it counts as no progress.
TRIES_WITHOUT_PROGRESS = 8


@dataclass
class Traffic:
    """What went through a file since it was opened.

    Args:
        written_bytes / read_bytes: in transfers that came to their end.
        retries: calls that were made again after an error.
        last_error: of any call, also one that was then made again: errno (its name), verb, path, offset_bytes.
    """

    written_bytes: int = 0
    read_bytes: int = 0
    retries: int = 0
    last_error: dict[str, Any] | None = None


class BlockFile(ABC):
    """Loops over partial reads and writes, and over errors that pass. A subclass moves some bytes and says how many.

    Args:
        path: or another name of it, for every error.
    """

    direct: bool | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        self._traffic = Traffic()
        self._traffic_lock = threading.Lock()

    @abstractmethod
    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        """Read up to len(view) bytes at the offset; 0 means end of file. Raises OSError."""

    @abstractmethod
    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        """Write up to len(view) bytes at the offset. Raises OSError."""

    @abstractmethod
    def close(self) -> None:
        """Release the file; may be called twice."""

    def read(self, view: memoryview, offset_bytes: int, label: str) -> None:
        """Fill the view from the offset.

        Args:
            view: length and address multiples of 4096 where the file is direct.
            label: what is read, for the error.

        Raises:
            TransferFailed: the file ends early, or the system answered with an error that did not pass.
        """
        self._whole("read", view, offset_bytes, label)

    def write(self, view: memoryview, offset_bytes: int, label: str) -> None:
        """Write the whole view at the offset; alignment as for read.

        Raises:
            TransferFailed: the device is full, or the system answered with an error that did not pass.
        """
        self._whole("write", view, offset_bytes, label)

    @property
    def traffic(self) -> Traffic:
        """What went through so far."""
        return self._traffic

    @property
    def num_retries(self) -> int:
        """Calls that were made again after an error."""
        return self.traffic.retries

    def record(self) -> dict[str, Any]:
        """JSON-able: paths, direct, retries, last_error, written_bytes, read_bytes."""
        traffic = self.traffic
        return {
            "paths": [self.path],
            "direct": self.direct,
            "retries": traffic.retries,
            "last_error": traffic.last_error,
            "written_bytes": traffic.written_bytes,
            "read_bytes": traffic.read_bytes,
        }

    def where(self, offset_bytes: int) -> str:
        """The place of a byte, for errors: file and offset in it."""
        return f"{self.path} at offset {offset_bytes}"

    def resident_bytes(self, offset_bytes: int, num_bytes: int) -> int | None:
        """Bytes of the range that the page cache holds; None where that cannot be known. Brings none in."""
        return None

    def _whole(self, verb: str, view: memoryview, offset_bytes: int, label: str) -> None:
        move = self.read_some if verb == "read" else self.write_some
        done, stuck = 0, 0
        failed: Counter[int | None] = Counter()
        while done < len(view):
            try:
                moved = move(view[done:], offset_bytes + done)
            except OSError as error:
                failed[error.errno] += 1
                self._try_again(error, failed[error.errno], (verb, offset_bytes + done, label))
                continue
            if done + moved >= len(view):
                break
            whole_blocks = moved // PAGE_BYTES * PAGE_BYTES
            if whole_blocks == 0:
                stuck += 1
                if moved == 0 and verb == "read":
                    why = f"the file ends after {done} of {len(view)} bytes; it was cut short: start the run again"
                    raise TransferFailed(self._message(verb, offset_bytes + done, label, why))
                if stuck >= TRIES_WITHOUT_PROGRESS:
                    why = f"only {done + moved} of {len(view)} bytes moved"
                    raise TransferFailed(self._message(verb, offset_bytes + done, label, why))
            done += whole_blocks
        self._count(verb, len(view))

    def _try_again(self, error: OSError, tries: int, where: tuple[str, int, str]) -> None:
        """Wait before the next try, or raise the error that a step gets to see."""
        verb, offset_bytes, label = where
        retries = retries_of(error)
        last = tries >= retries.num_tries
        with self._traffic_lock:
            self._traffic.retries += not last
            self._traffic.last_error = {
                "errno": name_of(error),
                "verb": verb,
                "path": self.path,
                "offset_bytes": offset_bytes,
            }
        if last:
            raise TransferFailed(self._message(verb, offset_bytes, label, explain(error, tries))) from error
        time.sleep(retries.wait_s(tries))

    def _count(self, verb: str, num_bytes: int) -> None:
        with self._traffic_lock:
            if verb == "read":
                self._traffic.read_bytes += num_bytes
            else:
                self._traffic.written_bytes += num_bytes

    def _message(self, verb: str, offset_bytes: int, label: str, why: str) -> str:
        return f"{label}: {verb} of {self.where(offset_bytes)} failed: {why}"


class DirectFile(BlockFile):
    """A file of the operating system.

    Args:
        path: an existing file.
        name: what errors and records call it; None: its path.
        direct: open with O_DIRECT: no byte passes through the page cache. Without it a write has reached memory when it
            returns, and an error of the drive behind it shows up as a checksum that differs at the load.

    Raises:
        TransferFailed: the file cannot be opened.
    """

    def __init__(self, path: str, *, direct: bool, name: str | None = None) -> None:
        super().__init__(name or path)
        self.direct = direct
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except OSError as error:
            raise TransferFailed(f"{self.path} cannot be opened: {explain(error)}") from error

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        """One preadv."""
        return os.preadv(self._fd, [view], offset_bytes)

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        """One pwritev."""
        return os.pwritev(self._fd, [view], offset_bytes)

    def resident_bytes(self, offset_bytes: int, num_bytes: int) -> int | None:
        """By cachestat or mincore, in whole pages; None if the kernel does not report it, or the file is closed."""
        try:
            return page_cache.resident_bytes(self._fd, offset_bytes, num_bytes)
        except OSError:
            return None

    def sync(self) -> None:
        """Wait until everything written is on the drive. Raises OSError."""
        os.fsync(self._fd)

    def forget_pages(self) -> None:
        """Ask the kernel to drop the pages of the file that are clean."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor; may be called twice. Never raises: the bytes are not read after it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # A mount that is gone answers with an error and frees the descriptor all the same.
            with contextlib.suppress(OSError):
                os.close(fd)

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True)
class DirectProbe:
    """Whether a folder's file system takes O_DIRECT, and how that is known."""

    direct: bool
    why: str


def probe_direct(folder: Path) -> DirectProbe:
    """Try one aligned block written and read back with O_DIRECT in `folder`; leaves nothing behind.

    Raises:
        OSError: the folder cannot be written at all.
    """
    fd = open_unnamed(folder)
    try:
        return _probe(path_of(fd))
    finally:
        os.close(fd)


def _probe(path: str) -> DirectProbe:
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return DirectProbe(False, f"open with O_DIRECT was refused: {error.strerror}")
    with mmap.mmap(-1, PAGE_BYTES) as block:
        pattern = os.urandom(PAGE_BYTES)
        block[:] = pattern
        try:
            os.pwritev(fd, [block], 0)
            block[:] = bytes(PAGE_BYTES)
            os.preadv(fd, [block], 0)
            same = block[:] == pattern
        except OSError as error:
            return DirectProbe(False, f"a 4096-byte block with O_DIRECT was refused: {error.strerror}")
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
    if not same:
        return DirectProbe(False, "a block written with O_DIRECT read back different")
    return DirectProbe(True, "a 4096-byte block was written and read back with O_DIRECT")
