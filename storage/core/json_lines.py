"""Files of JSON objects, one a line, that survive a kill and a full disk. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headrace.storage.core.outside import open_regular, parse_json


def legal_json(value: Any) -> Any:
    """The value without what JSON has no word for: NaN and infinities become null, others text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): legal_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [legal_json(item) for item in value]
    return str(value)


class JsonLines:
    """Appends objects to a file, one a line, from any thread; every line has left the process when append returns.

    A line that was cut by a kill is removed when the file is opened again. While the disk does not take lines, or the
    file cannot be opened, they wait in memory and are tried again with the next append; what a failed write left
    behind is cut off. Nothing here raises.

    Args:
        hold: keep a lock on the file, so that others see when this process has ended.
    """

    def __init__(self, path: Path, *, hold: bool = False) -> None:
        self.path, self._hold = path, hold
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._end = 0
        self.flush()

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Add one line of legal JSON. Returns why the disk refused it, if it did."""
        return self.append_text(json.dumps(legal_json(record), ensure_ascii=False, allow_nan=False))

    def append_text(self, text: str) -> OSError | None:
        """Add one line unchanged. Returns why it could not be written, if so."""
        with self._lock:
            self._waiting.append(text.encode("utf-8", errors="replace") + b"\n")
        return self.flush()

    def flush(self) -> OSError | None:
        """Try the waiting lines. Returns why the disk refused them, if it did."""
        with self._lock:
            try:
                fd = self._fd = self._open() if self._fd is None else self._fd
            except OSError as error:
                return error
            while self._waiting:
                line = self._waiting[0]
                try:
                    written = os.pwrite(fd, line, self._end)
                    if written < len(line):
                        raise OSError(errno.ENOSPC, "only a part of the line was written", str(self.path))
                except OSError as error:
                    with suppress(OSError):
                        os.ftruncate(fd, self._end)
                    return error
                self._end += written
                self._waiting.pop(0)
        return None

    def close(self) -> None:
        """Try what waits once more, then close the file."""
        self.flush()
        if self._fd is not None:
            os.close(self._fd)

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if self._hold:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = _end_of_last_line(fd)
            os.ftruncate(fd, self._end)
        except OSError:
            os.close(fd)
            raise
        return fd


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from byte `offset` on: (object, offset behind its line). Damaged lines are left out."""
    try:
        source = open_regular(path)
    except FileNotFoundError:
        return
    with source:
        source.seek(offset)
        for line in source:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                value = parse_json(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value, offset


def _end_of_last_line(fd: int) -> int:
    end = os.fstat(fd).st_size
    block = 1 << 16
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
