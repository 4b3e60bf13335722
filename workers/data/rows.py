"""Token rows on disk: two flat files that grow while documents are packed, and end as 2-D .npy arrays; and their sums.

    tokens.npy   (num_rows, seq_len + 1)  uint16, or uint32 for vocabularies above 65536
    flags.npy    (num_rows, seq_len + 1)  uint8, bits STARTS, TARGET, PADDING and CONTINUES
    rows.sums    (num_rows,)              uint64, raw: the XXH3 of a row's tokens and flags

Packing: documents, each with its end-of-document token, are written one after the other and the stream is cut every
seq_len + 1 tokens; what is left over in the last row is filled with end-of-document tokens that are not targets.
With rows of several lengths (row_sorter.py) there are two files per length, tokens-256.npy and flags-256.npy; rows.sums
holds the sums of all rows, the shortest first, and rows are numbered in this order.
A row is read as inputs row[:-1] and targets row[1:]. A token has STARTS where its document begins and in the first
column, so a document that continues in the next row is a new segment there; the running sum of STARTS in a row is the
segment number. A token has TARGET where its prediction counts in the loss. The filling of a row has PADDING; with one
length that of the last row has no flag of its own.

Several responses to one prompt follow it in the same row. The first token of each has CONTINUES beside STARTS: its
document continues the last one before it that has none. It is the token before the response's first target, so it is
there once for every response, and the prompt's document ends before it.

Two dimensions, because readers with 32-bit element offsets return wrong data beyond 2^31 elements of a 1-D file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from headrace.storage.core.errors import InputError, MachineError

STARTS, TARGET, PADDING, CONTINUES = 1, 2, 4, 8
TOKENS_FILE, FLAGS_FILE, SUMS_FILE = "tokens.npy", "flags.npy", "rows.sums"
# A .npy version 1 header of fixed size: it can be written before the number of rows is known.
HEADER_BYTES = 128


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def npy_header(dtype: np.dtype[np.unsignedinteger], num_rows: int, num_columns: int) -> bytes:
    """The 128-byte .npy version 1 header of a (num_rows, num_columns) array in C order."""
    body = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({num_rows}, {num_columns}), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + body.encode("ascii").ljust(HEADER_BYTES - 11) + b"\n"


def sum_of_row(tokens: bytes | memoryview, flags: bytes | memoryview) -> int:
    """XXH3 of the bytes of one row."""
    state = xxhash.xxh3_64()
    state.update(tokens)
    state.update(flags)
    return state.intdigest()


def names_of(length: int | None) -> tuple[str, str]:
    """Names of the two files that hold the rows of one length; None: there is only one length."""
    if length is None:
        return TOKENS_FILE, FLAGS_FILE
    first, second = (Path(name) for name in (TOKENS_FILE, FLAGS_FILE))
    return f"{first.stem}-{length}{first.suffix}", f"{second.stem}-{length}{second.suffix}"


def write_row_sums(folder: Path, lengths: Sequence[int | None] = (None,)) -> str:
    """Write SUMS_FILE of finished rows.

    Args:
        lengths: of the files, in the order of the rows; see names_of.

    Returns:
        Its sha256.

    Raises:
        MachineError: the disk is full.
    """
    sums = []
    for length in lengths:
        tokens, flags = (load_rows(folder / name) for name in names_of(length))
        sums += [sum_of_row(row.data, row_flags.data) for row, row_flags in zip(tokens, flags, strict=True)]
    content = np.array(sums, dtype="<u8").tobytes()
    with disk_errors(folder / SUMS_FILE):
        (folder / SUMS_FILE).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_rows(path: Path) -> npt.NDArray[np.integer[Any]]:
    """A file of rows, mapped; one without rows cannot be mapped and is read."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        assert version == (1, 0), "npy_header writes this version"
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.load(path, mmap_mode="r") if shape[0] else np.empty(shape, dtype)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say in words why `path` cannot be written.

    Raises:
        MachineError: the disk is full or read-only; names the file and what is free.
        InputError: there can be no such path.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(
                f"{error.filename or path}: cannot be made ({os.strerror(error.errno)}); choose another folder with "
                "data.cache_dir (out=... for `headrace data prepare`)"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        here = path if path.is_dir() else path.parent
        free = f", {shutil.disk_usage(here).free / 2**30:.2f} GiB free there" if here.is_dir() else ""
        raise MachineError(
            f"{error.filename or path}: cannot write token rows ({os.strerror(error.errno)}{free}); make room, or "
            "choose another folder with data.cache_dir (out=... for `headrace data prepare`)"
        ) from error


class RowWriter:
    """Appends packed tokens to the two files of a folder.

    Args:
        folder: an existing folder.
        seq_len: a row has seq_len + 1 tokens.
        vocab_size: token ids must be below it.
        position: continue after this many tokens and drop the rest; 0 starts again.
        length: of the rows, in the names of the files; None: there is only one length.

    Attributes:
        position: tokens in the stream, padding included. num_targets: those of them that count in the loss.

    Raises:
        MachineError: the disk is full or not writable.
    """

    def __init__(
        self, folder: Path, *, seq_len: int, vocab_size: int, position: int = 0, length: int | None = None
    ) -> None:
        self._num_columns, self._vocab_size = seq_len + 1, vocab_size
        self._dtype = token_dtype(vocab_size)
        self.folder, self.position, self.num_targets = folder, position, 0
        self._files: list[tuple[Path, BinaryIO, np.dtype[np.unsignedinteger]]] = []
        self._last_flag = 0 if length is None else PADDING
        for name, dtype in zip(names_of(length), (self._dtype, np.dtype(np.uint8)), strict=True):
            path = folder / name
            with disk_errors(path):
                file = open(path, "r+b" if position else "w+b")  # noqa: SIM115 - closed by close()
                self._files.append((path, file, dtype))
                if not position:
                    file.write(npy_header(dtype, 0, self._num_columns))
                    file.flush()
                file.truncate(HEADER_BYTES + position * dtype.itemsize)
                file.seek(0, os.SEEK_END)

    def append(self, ids: npt.NDArray[np.int64], flags: npt.NDArray[np.uint8], *, where: str) -> None:
        """Add tokens to the stream.

        Args:
            ids: (n,) token ids. flags: (n,) bits; STARTS of the first column is set here.
            where: the piece of the source they come from, for the error.

        Raises:
            InputError: an id is not below the vocabulary size.
            MachineError: the disk is full.
        """
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            bad = int(ids.max()) if int(ids.max()) >= self._vocab_size else int(ids.min())
            raise InputError(f"{where}: token id {bad} is outside the tokenizer's vocabulary of {self._vocab_size}")
        flags = flags.copy()
        flags[(-self.position) % self._num_columns :: self._num_columns] |= STARTS
        self.num_targets += int(((flags & (STARTS | TARGET)) == TARGET).sum())
        contents = (ids.astype(self._dtype).tobytes(), flags.tobytes())
        for (path, file, _), content in zip(self._files, contents, strict=True):
            with disk_errors(path):
                file.write(content)
        self.position += ids.size

    def flush(self) -> None:
        """Force what was appended to the device, so that a journal may name it."""
        for path, file, _ in self._files:
            with disk_errors(path):
                file.flush()
                os.fsync(file.fileno())

    @property
    def room(self) -> int:
        """Tokens that the row which is being filled still takes; 0 at the end of a row."""
        return -self.position % self._num_columns

    def fill_row(self, padding_id: int, flag: int = PADDING) -> int:
        """Fill the row with padding, which is a segment of its own without targets. Returns the tokens of it."""
        num_missing = self.room
        if num_missing:
            flags = np.full(num_missing, flag, dtype=np.uint8)
            flags[0] |= STARTS
            self.append(np.full(num_missing, padding_id, dtype=np.int64), flags, where="padding")
        return num_missing

    def finish(self, padding_id: int) -> int:
        """Fill the last row, write the headers and close.

        Returns:
            The number of rows.
        """
        self.fill_row(padding_id, self._last_flag)
        num_rows = self.position // self._num_columns
        for path, file, dtype in self._files:
            with disk_errors(path):
                file.seek(0)
                file.write(npy_header(dtype, num_rows, self._num_columns))
        self.flush()
        self.close()
        return num_rows

    def close(self) -> None:
        """Close the files as they are."""
        for path, file, _ in self._files:
            with disk_errors(path):
                file.close()
