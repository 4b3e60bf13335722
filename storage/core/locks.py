"""A lock between processes that ends with its holder. No torch."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FIRST_POLL_S, LAST_POLL_S = 0.0005, 0.05


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold a lock file, which is made where it is not there and stays.

    Raises:
        OSError: it cannot be made, or the file system has no locks. TimeoutError, an OSError: another process does not
            let go of it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until_s, poll_s = time.monotonic() + timeout_s, FIRST_POLL_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(poll_s)
                poll_s = min(2 * poll_s, LAST_POLL_S)
        yield
    finally:
        os.close(fd)
