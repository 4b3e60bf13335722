"""Whole, aligned reads and writes of one file, O_DIRECT where the file system takes it.

The kernel may move fewer bytes than asked; a blob is whole or it is an error. O_DIRECT wants file offset, length and
memory address in multiples of the block size (4096 here), so a short transfer is continued from its last whole block.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.ledger import BLOCK_BYTES

# EAGAIN of a loaded device is worth another try; every other errno is an answer.
TRIES_WHEN_BUSY = 8


class BlockFile(ABC):
    """Loops over partial reads and writes. A subclass moves some bytes and says how many.

    Args:
        path: named in every error.
    """

    def __init__(self, path: str) -> None:
        self.path = path

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
            TransferFailed: the file ends early, or the system answered with an error.
        """
        self._whole("read", view, offset_bytes, label)

    def write(self, view: memoryview, offset_bytes: int, label: str) -> None:
        """Write the whole view at the offset; alignment as for read.

        Raises:
            TransferFailed: the device is full, or the system answered with an error.
        """
        self._whole("write", view, offset_bytes, label)

    def _whole(self, verb: str, view: memoryview, offset_bytes: int, label: str) -> None:
        move = self.read_some if verb == "read" else self.write_some
        done, tries = 0, 0
        while done < len(view):
            try:
                moved = move(view[done:], offset_bytes + done)
            except OSError as error:
                if error.errno == errno.EAGAIN and tries < TRIES_WHEN_BUSY:
                    tries += 1
                    time.sleep(0.001 * 2**tries)
                    continue
                raise TransferFailed(self._message(verb, offset_bytes + done, label, error.strerror)) from error
            if done + moved >= len(view):
                return
            whole_blocks = moved // BLOCK_BYTES * BLOCK_BYTES
            if whole_blocks == 0:
                tries += 1
                if moved == 0 and verb == "read":
                    why = f"the file ends after {done} of {len(view)} bytes"
                    raise TransferFailed(self._message(verb, offset_bytes + done, label, why))
                if tries >= TRIES_WHEN_BUSY:
                    why = f"only {done + moved} of {len(view)} bytes moved"
                    raise TransferFailed(self._message(verb, offset_bytes + done, label, why))
            done += whole_blocks

    def _message(self, verb: str, offset_bytes: int, label: str, why: str | None) -> str:
        return f"{label}: {verb} of {self.path} at offset {offset_bytes} failed: {why}"


class DirectFile(BlockFile):
    """A file of the operating system.

    Args:
        path: an existing file.
        direct: open with O_DIRECT: no byte passes through the page cache.

    Raises:
        TransferFailed: the file cannot be opened.
    """

    def __init__(self, path: str, *, direct: bool) -> None:
        super().__init__(path)
        self.direct = direct
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except OSError as error:
            raise TransferFailed(f"{path} cannot be opened: {error.strerror}") from error

    def read_some(self, view: memoryview, offset_bytes: int) -> int:
        """One preadv."""
        return os.preadv(self._fd, [view], offset_bytes)

    def write_some(self, view: memoryview, offset_bytes: int) -> int:
        """One pwritev."""
        return os.pwritev(self._fd, [view], offset_bytes)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
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
    path = folder / f".headrace-probe-{os.getpid()}"
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        return _probe(path)
    finally:
        path.unlink()


def _probe(path: Path) -> DirectProbe:
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        return DirectProbe(False, f"open with O_DIRECT was refused: {error.strerror}")
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        pattern = os.urandom(BLOCK_BYTES)
        block[:] = pattern
        try:
            os.pwritev(fd, [block], 0)
            block[:] = bytes(BLOCK_BYTES)
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
