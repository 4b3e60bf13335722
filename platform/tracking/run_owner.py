"""Who writes into a run folder: one process at a time, by a lock that ends with the process. No mlflow, no torch."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.platform.tracking.run_folder import CONFIG_FILE, read_json
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.owners import Owner, this_process
from headrace.workers.train.checkpoint_folder import CheckpointFolder

OWNER_FILE = "owner.json"
# A process that checks whether a folder is owned holds the lock for a moment.
PATIENCE_S = 0.5


@dataclass(frozen=True)
class RunOwner:
    """The process that writes into a run folder, and since when."""

    process: Owner
    since_unix_s: float

    def __str__(self) -> str:
        since = f"{datetime.fromtimestamp(self.since_unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return f"process {self.process.pid} on {self.process.host}, since {since}"


@contextmanager
def own_run_folder(run_dir: Path, *, new: bool = False) -> Iterator[None]:
    """The folder is this process's alone for as long as the block runs. It is made where it is not there.

    A folder that was made for the block and is empty at its end is removed.

    Args:
        new: the folder must be empty, or not there.

    Raises:
        InputError: another process owns it (run_folder_in_use), it is not empty (run_folder_used), or nothing can be
            written there (run_folder_unusable).
    """
    path = run_dir / OWNER_FILE
    with ExitStack() as closing:
        with _explained(run_dir):
            str(run_dir).encode()  # its name goes into YAML, JSON and MLflow
            made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
            closing.callback(_remove_empty, made)
            run_dir.mkdir(parents=True, exist_ok=True)
            closing.callback(os.close, _take(path))
        closing.callback(path.unlink, missing_ok=True)
        if new:
            check_unused(run_dir)
        yield


def check_unused(run_dir: Path) -> None:
    """Refuse a folder for a new run that holds something. Names the command that resumes it only if that would work.

    Raises:
        InputError: it is a file or not empty (run_folder_used), owned (run_folder_in_use) or cannot be read.
    """
    with _explained(run_dir):
        if not run_dir.exists():
            return
        names = set(os.listdir(run_dir)) - {OWNER_FILE}
    owner = owner_of_run(run_dir)
    if owner is not None and owner.process != this_process():
        raise _in_use(run_dir, owner)
    if names:
        steps = CheckpointFolder(run_dir / "checkpoints").committed_steps()
        more = ""
        if steps and CONFIG_FILE in names:
            more = f", or continue its run after step {steps[0]}: headrace train --resume {shlex.quote(str(run_dir))}"
        raise InputError(
            f"run.dir={run_dir}: exists and is not empty; name another folder{more}", id=ErrorId.run_folder_used
        )


def owner_of_run(run_dir: Path) -> RunOwner | None:
    """The running process that owns a run folder; None if there is none."""
    try:
        fd = os.open(run_dir / OWNER_FILE, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        free = _lock(fd, fcntl.LOCK_SH)
        owner = _read(run_dir / OWNER_FILE)
        if free is None:
            free = owner is None or not owner.process.is_alive()
        return None if free else owner or RunOwner(Owner("an unknown host", "", 0, 0), os.fstat(fd).st_mtime)
    finally:
        os.close(fd)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # something is in it
            folder.rmdir()


def _take(path: Path) -> int:
    """A descriptor that holds the lock; the file names this process."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            free = _lock(fd, fcntl.LOCK_EX)
            owner = _read(path)
            if free is None:  # a file system without locks: what the file says
                free = owner is None or not owner.process.is_alive()
            if free and _is_still_there(path, fd):
                record = json.dumps(asdict(RunOwner(this_process(), time.time()))).encode()
                os.ftruncate(fd, 0)
                os.pwrite(fd, record, 0)
                return fd
            if not free and time.monotonic() > until_s:
                raise _in_use(path.parent, owner)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        time.sleep(0.01)


def _lock(fd: int, kind: int) -> bool | None:
    """Whether the lock was free; None where the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still_there(path: Path, fd: int) -> bool:
    """Whether the file was not removed by an owner that ended between open and lock."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _read(path: Path) -> RunOwner | None:
    facts = read_json(path)
    try:
        return RunOwner(Owner(**facts["process"]), float(facts["since_unix_s"]))
    except (KeyError, TypeError, ValueError):
        return None


def _in_use(run_dir: Path, owner: RunOwner | None) -> InputError:
    return InputError(
        f"{run_dir}: {owner or 'another process'} writes there. Wait until it ends, or stop it"
        + (f" (on {owner.process.host}: kill {owner.process.pid})" if owner is not None and owner.process.pid else "")
        + ", or name another folder with run.dir=DIR",
        id=ErrorId.run_folder_in_use,
    )


@contextmanager
def _explained(run_dir: Path) -> Iterator[None]:
    """What the system says about a path as a sentence for the user."""
    try:
        yield
    except (NotADirectoryError, FileExistsError) as error:
        raise _unusable(run_dir, f"{error.filename or run_dir} is no folder") from None
    except UnicodeEncodeError:
        raise _unusable(run_dir, "the name is not UTF-8") from None
    except OSError as error:
        raise _unusable(run_dir, error.strerror or str(error)) from None


def _unusable(run_dir: Path, why: str) -> InputError:
    shown = str(run_dir).encode(errors="backslashreplace").decode()
    return InputError(
        f"run.dir={shown}: it cannot be written ({why}); name another folder with run.dir=DIR (a run to go on "
        "with: copy its folder to a place that can be written)",
        id=ErrorId.run_folder_unusable,
    )
