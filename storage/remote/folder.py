"""A folder in an object store (or behind any URL that fsspec supports): listing, ranged reads, whole files. No torch.

Endpoint and credentials come from where the store's own tools look for them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
AWS_PROFILE, ~/.aws), never from our keys. An answer shorter than what was asked for is an error, and errors that
may pass are tried again a bounded number of times.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from headrace.storage.core.durable import sync_folder
from headrace.storage.core.errors import InputError
from headrace.storage.remote.cache import cache_errors, check_room
from headrace.storage.remote.errors import INSTALL, RemoteChanged, RemoteMissing, RemoteUnavailable, named_error

# Waits of 0.25, 0.5, ... 4 s between them, give or take a half: a store that restarts or sheds load is back by then.
ATTEMPTS = 6
FIRST_WAIT_S = 0.25
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 30
NUM_CONNECTIONS = 32
# A whole file comes in parts of this size, as many at a time as fit WINDOW_BYTES.
PART_BYTES, WINDOW_BYTES = 8 << 20, 128 << 20
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://")
_S3 = ("s3", "s3a")
T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """What the store says of an object: bytes, and what changes when it is replaced (ETag, or time of change)."""

    num_bytes: int
    version: str


@dataclass(frozen=True)
class ByteRange:
    """Bytes [begin, end) of a file below the folder."""

    name: str
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """How many."""
        return self.end - self.begin


def is_remote(path: str | Path | None) -> bool:
    """Whether a path is a URL such as s3://bucket/prefix. Keep it a string: a Path would fold its slashes."""
    return isinstance(path, str) and _URL.match(path) is not None


def refuse_remote(key: str, text: str) -> None:
    """Refuse a URL where a local path is expected: as a path it would name a local folder called `s3:`.

    Raises:
        InputError: names key, value and remedy.
    """
    if is_remote(text):
        raise InputError(
            f"{key}={text}: is a URL, a local path is expected; copy from or to the store with its own tool"
        )


def open_remote(url: str) -> RemoteFolder:
    """The folder of a URL. No request is sent yet.

    Raises:
        InputError: the scheme is unknown, or what it needs is not installed.
    """
    match = _URL.match(url)
    if match is None:
        raise InputError(f"{url}: is not a URL; give one such as s3://bucket/folder")
    scheme = match["scheme"].lower()
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{url}: fsspec cannot be imported ({error}); {INSTALL}") from error
    try:
        options = _s3_options() if scheme in _S3 else {}
        filesystem, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        how = INSTALL if scheme in _S3 else "install the package that fsspec names"
        raise InputError(f"{url}: {scheme}:// cannot be read ({error}); {how}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}; s3:// is what headrace is tested with") from error
    if scheme in _S3:
        filesystem.retries, filesystem.batch_size = 1, NUM_CONNECTIONS
    return RemoteFolder(url.rstrip("/"), filesystem, str(root).rstrip("/"))


def _s3_options() -> dict[str, Any]:
    from aiobotocore.session import AioSession

    session = AioSession()
    session.register_component("data_loader", _service_models())
    # One retry loop, ours: three nested ones would wait for minutes.
    return {
        "session": session,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": NUM_CONNECTIONS,
        },
    }


@cache
def _service_models() -> Any:
    # Reading them takes a third of a second; credentials are looked up anew by every session.
    from botocore.loaders import create_loader

    return create_loader()


class RemoteFolder:
    """Reads below one URL. Any number of threads may call it.

    Args:
        url: without a slash at its end.
        filesystem: of fsspec. root: the folder's name there.

    Attributes:
        bytes_read: of contents that arrived whole. num_retries: attempts beyond the first.
    """

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url
        self.bytes_read = self.num_retries = 0
        self._filesystem, self._root = filesystem, root
        self._stopped = threading.Event()

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def url_of(self, name: str) -> str:
        """URL of a file below the folder; of the folder itself where `name` is empty."""
        return f"{self.url}/{name}" if name else self.url

    def info(self, name: str) -> RemoteFile:
        """Size and version of one file, requested from the store now.

        Raises:
            RemoteMissing, InputError, RemoteUnavailable: see named_error.
        """
        facts = self._try(name, lambda: self._filesystem.info(self._path_of(name)))
        if facts["type"] != "file":
            raise RemoteMissing(f"{self.url_of(name)}: is a folder, a file is expected; check the name")
        return _remote_file(facts)

    def files(self, below: str = "") -> dict[str, RemoteFile]:
        """All files below `below`, by their name below the folder.

        Raises:
            RemoteMissing: there are none; says what is there instead. InputError, RemoteUnavailable: see named_error.
        """
        found = self._try(below, lambda: self._filesystem.find(self._path_of(below), detail=True))
        named = {path.removeprefix(self._root).lstrip("/"): _remote_file(facts) for path, facts in found.items()}
        named.pop("", None)
        if not named:
            raise RemoteMissing(f"{self.url_of(below)}: there is nothing{self._instead(below)}; check the URL")
        return named

    def read(self, name: str) -> bytes:
        """A whole small file.

        Raises:
            RemoteMissing: says what is there instead. InputError, RemoteUnavailable: see named_error.
        """
        file = self.info(name)
        return self.read_bytes(name, 0, file.num_bytes)

    def read_bytes(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file, all of them.

        Raises:
            RemoteMissing, InputError, RemoteUnavailable: see named_error.
        """
        return self.read_ranges([ByteRange(name, begin, end)])[0]

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Several ranges at once, each whole, in order. Requests with a temporary error are repeated.

        Raises:
            RemoteMissing, InputError, RemoteUnavailable: see named_error.
        """
        contents: list[bytes] = [b""] * len(ranges)
        missing = [i for i, part in enumerate(ranges) if part.num_bytes > 0]
        for attempt in range(ATTEMPTS):
            failures: list[tuple[int, Exception]] = []
            for i, content in zip(missing, self._ask_for([ranges[i] for i in missing]), strict=True):
                if isinstance(content, Exception):
                    failures.append((i, content))
                else:
                    contents[i] = content
                    self.bytes_read += len(content)
            if not failures:
                break
            for i, failure in failures:
                self._raise_unless_it_may_pass(ranges[i].name, failure, attempt)
            missing = [i for i, _ in failures]
            self._wait(attempt)
        return contents

    def fetch(self, name: str, target: Path, there: RemoteFile | None = None) -> None:
        """Copy a file to `target`, which appears whole and on the disk, or not at all. For one process at a time.

        Args:
            there: what `info` or `files` said of it.

        Raises:
            RemoteChanged: it was replaced meanwhile. MachineError: no room here. And those of read_ranges.
        """
        there = self.info(name) if there is None else there
        partial = target.with_name(f".{target.name}.part")
        with cache_errors(target):
            try:
                with open(partial, "wb") as file:
                    for begin in range(0, there.num_bytes, WINDOW_BYTES):
                        stop = min(begin + WINDOW_BYTES, there.num_bytes)
                        starts = range(begin, stop, PART_BYTES)
                        parts = [ByteRange(name, start, min(start + PART_BYTES, stop)) for start in starts]
                        file.writelines(self.read_ranges(parts))
                    file.flush()
                    os.fsync(file.fileno())
                self.check_unchanged({name: there})
                partial.rename(target)
                sync_folder(target.parent)
            finally:
                partial.unlink(missing_ok=True)

    def fetch_all(self, files: Mapping[str, RemoteFile], folder: Path) -> None:
        """Copy files into an existing local folder, by the same names. Those there that are as long stay as they are.

        Raises:
            MachineError: no room for them, known before the first is fetched. And those of `fetch`.
        """
        wanted = {name: there for name, there in files.items() if not _is_there(folder / name, there)}
        check_room(folder, sum(there.num_bytes for there in wanted.values()))
        for name, there in wanted.items():
            with cache_errors(folder / name):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            self.fetch(name, folder / name, there)

    def check_unchanged(self, files: Mapping[str, RemoteFile]) -> None:
        """Refuse files that were replaced: what was read before this call came from the files as they were.

        Raises:
            RemoteChanged: names the URL. And those of `info`.
        """
        for name, before in files.items():
            if (now := self.info(name)) != before:
                raise RemoteChanged(
                    f"{self.url_of(name)}: was replaced while it was in use ({before.num_bytes} bytes, version "
                    f"{before.version}; now {now.num_bytes} bytes, version {now.version}); start again"
                )

    def stop(self) -> None:
        """Make calls that wait for another attempt give up, and later ones not wait. For other threads to call."""
        self._stopped.set()

    def _path_of(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask_for(self, ranges: Sequence[ByteRange]) -> list[bytes | Exception]:
        answers = self._filesystem.cat_ranges(
            [self._path_of(part.name) for part in ranges],
            [part.begin for part in ranges],
            [part.end for part in ranges],
            on_error="return",
        )
        return [_whole(answer, part) for answer, part in zip(answers, ranges, strict=True)]

    def _try(self, name: str, call: Callable[[], T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except Exception as error:
                self._raise_unless_it_may_pass(name, error, attempt)
            self._wait(attempt)
        raise AssertionError("the last attempt returns or raises")

    def _raise_unless_it_may_pass(self, name: str, error: Exception, attempt: int) -> None:
        named = named_error(self.url_of(name), self._endpoint(), error)
        if named is None:
            raise error
        if isinstance(named, RemoteMissing):
            raise RemoteMissing(f"{named}{self._instead(name)}") from error
        if not isinstance(named, RemoteUnavailable) or attempt + 1 >= ATTEMPTS or self._stopped.is_set():
            raise named from error

    def _wait(self, attempt: int) -> None:
        self.num_retries += 1
        # Ranks that failed together do not come back together.
        self._stopped.wait(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))

    def _endpoint(self) -> str:
        try:
            return str(self._filesystem.s3.meta.endpoint_url)
        except Exception:  # the error that is being reported has the reason
            return _URL.match(self.url)[0]  # type: ignore[index]

    def _instead(self, name: str) -> str:
        """What the parent of a missing name holds, for the message; nothing where that cannot be found out."""
        parent = self._path_of(name).rpartition("/")[0]
        try:
            entries = self._filesystem.ls(parent, detail=False)
        except Exception:
            return ""
        names = sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"; beside it there is: {shown}" if shown else ""


def _whole(answer: Any, part: ByteRange) -> bytes | Exception:
    if isinstance(answer, Exception):
        return answer
    if len(answer) != part.num_bytes:
        return OSError(errno.EIO, f"{len(answer)} bytes came of bytes {part.begin} to {part.end}")
    return bytes(answer)


def _is_there(path: Path, there: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == there.num_bytes


def _remote_file(facts: Mapping[str, Any]) -> RemoteFile:
    version = facts.get("ETag") or facts.get("etag") or facts.get("mtime") or ""
    return RemoteFile(int(facts["size"]), str(version).strip('"'))
