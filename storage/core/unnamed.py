"""Files without a name: the kernel frees their bytes when the last process that has them open ends, however it ends.

Another process of the same user opens such a file as /proc/PID/fd/N, for as long as process PID keeps it open. `df`
counts the bytes; `ls` and `du` do not see them, /proc/PID/fd does.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

# What a file system without O_TMPFILE answers; the second one where it takes the call for a plain open of a folder.
WITHOUT_O_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR)


def open_unnamed(folder: Path) -> int:
    """A new, empty file on the folder's file system; returns its descriptor.

    Where the file system has no O_TMPFILE, the file has a name for a moment and is empty then.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in WITHOUT_O_TMPFILE:
            raise
    path = folder / f".headrace-{uuid.uuid4().hex}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
    except OSError:
        os.close(fd)
        raise
    return fd


def path_of(fd: int) -> str:
    """Where other processes of the same user open a file that this process has open."""
    return f"/proc/{os.getpid()}/fd/{fd}"
