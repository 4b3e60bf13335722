"""Files of tiers: their names, their owners, and the removal of those whose owner is dead.

A slab's name carries its run and its owner's host and process, and the owner holds a lock on the file from before it
has that name. A file goes only when nobody owns it: the lock is free, and where the owner was of this host its process
is gone too (another container may see the file, but not the process; a network file system may not keep the lock).
Slab files outside /dev/shm lie in run folders, so each leaves a note in the user's cache folder, where the next start
finds it, whichever run that is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.core.owners import Owner, this_process

NAME = re.compile(r"headrace-[\w.]+-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.slab")


def slab_name(run_id: str) -> str:
    """A new file name for a slab of this process."""
    run = re.sub(r"[^\w.]", "_", run_id)[:80] or "run"
    return f"headrace-{run}-{_host_tag()}-{this_process().tag}-{uuid.uuid4().hex[:8]}.slab"


def create_slab_file(path: Path) -> int:
    """Create `path` for this process alone to own; returns the descriptor that holds the lock."""
    unlocked = path.with_name(f".{path.name}.new")
    fd = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(path)
    except OSError:  # a file system without locks
        os.close(fd)
        unlocked.unlink(missing_ok=True)
        raise
    return fd


def sweep_folder(folder: Path) -> list[Path]:
    """Remove the slabs of dead processes in `folder`; returns what was removed."""
    return [path for path, here, alive in _slabs_in(folder) if not (here and alive) and _remove(path)]


@contextmanager
def promising(folder: Path) -> Iterator[None]:
    """Nobody else on the node counts what is promised, or promises, for as long as the context lasts.

    Between two owners that both look first and promise then, the same memory would go twice. Nothing to do where the
    folder is not there: slabs are then seen by their owners alone.
    """
    if not folder.is_dir():
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def promised_bytes(folder: Path) -> int:
    """Bytes that living owners of slabs in `folder` have promised to run with and not touched yet.

    A slab's file has its whole size from the start, and its blocks come as it is touched: what is missing still looks
    like free memory. A memfd slab has a file of holes there until it is touched.
    """
    missing = 0
    for path, here, alive in _slabs_in(folder):
        if alive or not here:
            with contextlib.suppress(OSError):  # its owner has just closed it
                found = path.stat()
                missing += max(0, found.st_size - 512 * found.st_blocks)
    return missing


def note_slab(path: Path) -> Path | None:
    """Leave a note about a slab file for later sweeps; None, with a warning, where the cache folder is not writable."""
    try:
        folder = _notes_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        note = folder / f"{path.name}.json"
        unfinished = note.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"path": str(path.resolve()), **asdict(this_process())}))
        unfinished.replace(note)
    except OSError as error:
        warnings.warn(
            f"{path} could not be noted for clean-up ({error}): should this process be killed, remove the file by "
            "hand, or set XDG_CACHE_HOME to a writable folder",
            stacklevel=2,
        )
        return None
    return note


def sweep_notes() -> list[Path]:
    """Remove the noted slab files whose owner is dead, and their notes; returns the files removed."""
    removed: list[Path] = []
    folder = _notes_folder()
    for note in sorted(folder.glob("*.slab.json")) if folder.is_dir() else []:
        try:
            facts = parse_json(read_regular(note))
            path = Path(facts.pop("path"))
            owner = Owner(**facts)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # another process removes or writes it right now
        if owner.host != socket.gethostname() or owner.is_alive():
            continue
        gone = not path.exists()
        if not gone and NAME.fullmatch(path.name) and _remove(path):
            removed.append(path)
            gone = True
        if gone:
            note.unlink(missing_ok=True)
    return removed


def _slabs_in(folder: Path) -> Iterator[tuple[Path, bool, bool]]:
    """Slab files, whether their owner is of this host, and whether a process of this host with its id runs."""
    this = this_process()
    for path in sorted(folder.glob("headrace-*.slab")) if folder.is_dir() else []:
        match = NAME.fullmatch(path.name)
        if match is not None:
            owner = Owner(this.host, this.boot_id, int(match["pid"]), int(match["start"]))
            yield path, match["host"] == _host_tag(), owner.is_alive()


def _host_tag() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _notes_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "headrace" / "slabs"


def _remove(path: Path) -> bool:
    """Remove a regular file of ours that nobody holds a lock on."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    return True
