"""Token rows of a remote folder: a sparse local copy of its files, filled as rows are needed. No torch.

    tokens.npy, flags.npy   as long as the remote ones, with holes where rows have not been fetched; one pair per length
    rows.sums               the whole remote file: what every row must sum up to
    mirror.json             which remote files these are

A process compares a row with its sum before it first reads it. So a row that is a hole, was half-written, never reached
the disk, or was damaged there is fetched again, with no lock between the ranks of a node: two that fetch the same row
write the same bytes. The name of the folder holds the versions of the remote files; replaced ones have a mirror of
their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from headrace.storage.core.durable import replace_durably
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.remote.cache import cache_errors, cache_folder, locked
from headrace.storage.remote.errors import RemoteUnavailable
from headrace.storage.remote.folder import ByteRange, RemoteFile, RemoteFolder, open_remote
from headrace.workers.data.index import RowNumbers
from headrace.workers.data.prepared import META_FILE, MIRROR_FILE, PreparedData, check_array, parse_meta
from headrace.workers.data.row_reader import RowReader, Rows
from headrace.workers.data.rows import HEADER_BYTES, SUMS_FILE, npy_header, sum_of_row
from headrace.workers.data.tokenizer_files import TOKENIZER_FILE

STEPS_AHEAD = 8
# Rows are fetched in groups of about this size: what a fetch holds in memory.
GROUP_BYTES = 64 << 20


def open_remote_rows(url: str) -> PreparedData:
    """Look at a remote prepared folder and make its empty mirror, where there is none yet.

    Raises:
        InputError: not a prepared folder, files that meta.json does not describe, or no access. MachineError: the store
        cannot be reached, or no room for the mirror.
    """
    remote = open_remote(url)
    meta = remote.read(META_FILE)
    arrays = {
        name: array for array in parse_meta(meta, remote.url_of(META_FILE), Path()).arrays for name in array.dtypes
    }
    files = {name: remote.info(name) for name in arrays}
    identity = (remote.url, hashlib.sha256(meta).hexdigest(), *((name, *vars(files[name]).values()) for name in files))
    folder = cache_folder("rows", remote.name, *identity)
    data = parse_meta(meta, remote.url_of(META_FILE), folder, remote.url)
    headers = remote.read_ranges([ByteRange(name, 0, min(HEADER_BYTES, files[name].num_bytes)) for name in files])
    for name, header in zip(files, headers, strict=True):
        check_array(remote.url_of(name), files[name].num_bytes, header, arrays[name])
    with locked(folder):
        _make_mirror(remote, files, data)
    return data


def _make_mirror(remote: RemoteFolder, files: dict[str, RemoteFile], data: PreparedData) -> None:
    """Make what is missing of the mirror, MIRROR_FILE last. Files that are there may be in use and stay as they are."""
    folder = data.folder
    with cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for array in data.arrays:
            for name, dtype in array.dtypes.items():
                header = npy_header(dtype, array.num_rows, array.seq_len + 1)
                _make_sparse(folder / name, header, files[name].num_bytes)
    small = {SUMS_FILE: data.sums_digest, TOKENIZER_FILE: data.tokenizer_digest, **data.companions}
    for name, wanted in small.items():
        _fetch_whole(remote, name, folder / name, wanted)
    facts = {"url": remote.url, "files": {name: vars(there) for name, there in files.items()}}
    with cache_errors(folder):
        replace_durably(folder / MIRROR_FILE, json.dumps(facts, indent=1).encode() + b"\n")


def _fetch_whole(remote: RemoteFolder, name: str, path: Path, wanted: str) -> None:
    """A file that is not read by rows, fetched where it is not here, and of the digest that meta.json says."""
    if not path.is_file():
        with cache_errors(path):
            path.parent.mkdir(exist_ok=True)
        remote.fetch(name, path)
    found = hashlib.sha256(read_regular(path)).hexdigest()
    if found != wanted:
        path.unlink()
        raise InputError(
            f"{remote.url_of(name)}: digest {found[:16]}..., {META_FILE} says {wanted[:16]}...: it does not "
            "belong to these rows, or was damaged; upload the folder again",
            id=ErrorId.data_damaged,
        )


def _make_sparse(path: Path, head: bytes, num_bytes: int) -> None:
    if path.is_file() and path.stat().st_size == num_bytes:
        return
    partial = path.with_name(f".{path.name}.part")
    with open(partial, "wb") as file:
        file.write(head)
        file.truncate(num_bytes)
    partial.rename(path)


class RowMirror:
    """Brings rows of remote data into its local mirror. Any number of threads and processes at a time.

    Args:
        data: of open_remote_rows.

    Attributes:
        remote: whose `bytes_read` count.
    """

    def __init__(self, data: PreparedData) -> None:
        assert data.url is not None, "local data has no mirror"
        self.remote = open_remote(data.url)
        self._data = data
        facts = parse_json(read_regular(data.folder / MIRROR_FILE))
        self._versions = {name: RemoteFile(**values) for name, values in facts["files"].items()}
        self._row_bytes = {
            name: (array.seq_len + 1) * dtype.itemsize for array in data.arrays for name, dtype in array.dtypes.items()
        }
        self._files = {name: os.open(data.folder / name, os.O_RDWR) for name in self._row_bytes}
        self._sums = data.row_sums()
        self._known = np.zeros(data.num_rows, dtype=bool)

    def has(self, rows: RowNumbers) -> bool:
        """Whether all of these rows are here, as far as this process knows."""
        return bool(self._known[rows].all())

    def ensure(self, rows: RowNumbers) -> None:
        """Return when all of these rows (any shape) are here, and whole.

        Raises:
            RemoteUnavailable: they cannot be fetched now. RemoteChanged: the remote files were replaced. InputError: no
            access, or gone. MachineError: no room here.
        """
        rows = np.unique(rows)
        missing = [int(row) for row in rows[~self._known[rows]] if not self._is_here(int(row))]
        longest = self._data.arrays[-1].dtypes
        group_rows = max(1, GROUP_BYTES // sum(self._row_bytes[name] for name in longest))
        for begin in range(0, len(missing), group_rows):
            self._fetch(missing[begin : begin + group_rows])
        self._known[rows] = True

    def stop(self) -> None:
        """Make the threads that are in here give up soon."""
        self.remote.stop()

    def close(self) -> None:
        """Let go of the files, when no thread is in here any more; may be called twice."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _is_here(self, row: int) -> bool:
        parts = self._ranges_of(row)
        found = (os.pread(self._files[part.name], part.end - part.begin, part.begin) for part in parts)
        return int(self._sums[row]) == sum_of_row(*found)

    def _fetch(self, rows: list[int]) -> None:
        ranges = [part for pair in zip(*map(self._ranges_of, rows), strict=True) for part in pair]
        contents = self.remote.read_ranges(ranges)
        # Bytes of files that were replaced must not be marked; the store answers in the order of its own changes.
        self.remote.check_unchanged(self._versions)
        for row, *parts in zip(rows, contents[: len(rows)], contents[len(rows) :], strict=True):
            if sum_of_row(*parts) != int(self._sums[row]):
                raise self._data.damaged(row)
        with cache_errors(self._data.tokens_path):
            for part, content in zip(ranges, contents, strict=True):
                _write(self._files[part.name], content, part.begin)

    def _ranges_of(self, row: int) -> list[ByteRange]:
        """Where the tokens and the flags of a row are."""
        array, found = self._data.array_of(row), []
        for name in array.dtypes:
            begin = HEADER_BYTES + (row - array.first_row) * self._row_bytes[name]
            found.append(ByteRange(name, begin, begin + self._row_bytes[name]))
        return found


class ReadAhead:
    """Has the rows of a step here when they are read, and fetches those of the steps behind it meanwhile.

    An error of reading ahead is reported at the next step. An unreachable store gives a warning only, and is tried
    again: it may be back when the rows are needed.

    Args:
        mirror: shared by the readers of a process.
        rows_of: step -> row numbers of any shape; pure.
        steps_ahead: how far it reads ahead; None: STEPS_AHEAD.
    """

    def __init__(self, mirror: RowMirror, rows_of: Callable[[int], RowNumbers], steps_ahead: int | None = None) -> None:
        self._mirror, self._rows_of = mirror, rows_of
        self._steps_ahead = STEPS_AHEAD if steps_ahead is None else steps_ahead
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="rows-ahead")
        self._ahead: dict[int, Future[None]] = {}

    def __call__(self, step: int) -> None:
        """Return when the rows of `step` may be read.

        Raises:
            Those of RowMirror.ensure, of this step or found ahead of it.
        """
        self._tell()
        for other in [other for other in self._ahead if not step <= other <= step + self._steps_ahead]:
            self._ahead.pop(other).cancel()
        own = self._ahead.pop(step, None)
        if own is None or own.cancel():  # no thread works on it
            self._ensure(step)
        else:
            own.result()
        self._ahead[step] = _done()
        for wanted in range(step + 1, step + 1 + self._steps_ahead):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self._ensure, wanted)

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ensure(self, step: int) -> None:
        rows = self._rows_of(step)
        if not self._mirror.has(rows):
            self._mirror.ensure(rows)

    def _tell(self) -> None:
        for step, future in list(self._ahead.items()):
            error = future.exception() if future.done() else None
            if isinstance(error, RemoteUnavailable):
                del self._ahead[step]
                warnings.warn(f"reading ahead of step {step} failed and is tried again: {error}", stacklevel=3)
            elif error is not None:
                raise error


class MirroredReader:
    """A reader of the mirror, and who fills it ahead of the reader.

    Args:
        reader: calls `ahead` before it reads the rows of a step.
    """

    def __init__(self, reader: RowReader, ahead: ReadAhead) -> None:
        self._reader, self._ahead = reader, ahead

    def read(self, step: int) -> list[Rows]:
        """The micro-batches of `step`."""
        return self._reader.read(step)

    def close(self) -> None:
        """Let go of files and threads; may be called twice."""
        self._reader.close()
        self._ahead.close()


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _write(fd: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
