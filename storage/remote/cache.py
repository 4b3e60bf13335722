"""The local place of what was fetched: $XDG_CACHE_HOME/headrace/remote. Shared by the processes of a user. No torch."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.storage.core.errors import MachineError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG)


def cache_home() -> Path:
    """The user's cache of this project."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # Relative ones are to be ignored, by the XDG base directory specification.
    base = Path(given) if given.startswith("/") else Path("~/.cache").expanduser()
    return base / "headrace"


def cache_root() -> Path:
    """Where everything fetched is kept; may be removed while no run uses it."""
    return cache_home() / "remote"


def cache_folder(kind: str, name: str, *identity: object) -> Path:
    """The folder of one thing. It may not be there yet.

    Args:
        kind: rows, models or runs.
        name: for people. identity: what another thing of that name differs in.
    """
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return cache_root() / kind / key / (name or "root")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder between the processes of this user. The lock is released when the process ends.

    Raises:
        MachineError: the cache cannot be written.
    """
    lock = cache_root() / "locks" / hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    with cache_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a")  # noqa: SIM115 - lives as long as the lock
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """Say in words why `path`, or another file beside it, cannot be written.

    Raises:
        MachineError: the disk is full, or there may be no such file; names it, what is free and the remedy.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_NO_ROOM, *_NO_RIGHT):
            raise
        raise MachineError(
            f"{error.filename or path}: cannot be written ({os.strerror(error.errno)}{_free(path)}); make room, or "
            "give another disk with XDG_CACHE_HOME (for a run that is resumed: with run.dir)"
        ) from error


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        folder: an existing one.

    Raises:
        MachineError: names bytes wanted and there.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MachineError(
            f"{folder}: {num_bytes} bytes are to be fetched, {free} are free; make room, or give another disk with "
            "XDG_CACHE_HOME (for a run that is resumed: with run.dir)"
        )


def _free(path: Path) -> str:
    here = next((folder for folder in path.absolute().parents if folder.is_dir()), None)
    return "" if here is None else f", {shutil.disk_usage(here).free / 2**30:.2f} GiB free there"
