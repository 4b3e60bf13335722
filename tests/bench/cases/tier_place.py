"""Where the bytes of a measurement lie: a folder on a real drive, removed afterwards, and the page cache beside it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from headrace.platform.tracking.provenance import SOURCE_DIR
from headrace.storage.core.errors import InputError, MachineError

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


@contextmanager
def scratch_folder(wanted: str) -> Iterator[Path]:
    """A new folder below `wanted` (default: on the checkout's file system), removed with all it holds.

    Raises:
        InputError: the folder cannot be written, or lies in memory, where O_DIRECT says nothing about a drive.
    """
    parent = Path(wanted) if wanted else _default_parent()
    is_new = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        kind = file_system(parent)
        if kind in IN_MEMORY:
            raise InputError(
                f"folder={parent} is a {kind}: its bytes are in memory, so it does not measure a drive; give "
                "folder=DIR on a local drive"
            )
        made = tempfile.TemporaryDirectory(prefix="headrace-bench-tiers-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(
            f"folder={parent} cannot be used ({error.strerror}); give folder=DIR on a local drive"
        ) from error
    try:
        with made as folder:
            yield Path(folder)
    finally:
        if is_new:
            with suppress(OSError):  # another process uses it meanwhile
                parent.rmdir()


def file_system(folder: Path) -> str:
    """The kind of file system that an existing folder lies on, as the kernel names it: ext4, xfs, tmpfs, overlay."""
    path = folder.resolve()
    kind, longest = "", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        point = Path(fields[4].encode().decode("unicode_escape"))
        # A later mount on the same point hides the earlier one.
        if path.is_relative_to(point) and len(point.parts) >= longest:
            kind, longest = fields[fields.index("-") + 1], len(point.parts)
    return kind


def cached_pages(path: str, offset_bytes: int, num_bytes: int) -> int:
    """How many pages of a range of a file the page cache holds, by mincore(2).

    Args:
        path: a file of this user: of others' files the kernel does not say.
        offset_bytes: a multiple of the page size.

    Raises:
        MachineError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pages = np.zeros(-(-num_bytes // mmap.PAGESIZE), np.uint8)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), num_bytes, prot=mmap.PROT_READ, offset=offset_bytes) as view,
    ):
        start = np.frombuffer(view, np.uint8)
        try:
            address = ctypes.c_void_p(start.ctypes.data)
            failed = libc.mincore(address, ctypes.c_size_t(num_bytes), ctypes.c_void_p(pages.ctypes.data))
        finally:
            del start  # the mapping cannot be closed under it
    if failed:
        raise MachineError(f"mincore of {path} failed: {os.strerror(ctypes.get_errno())}")
    return int((pages & 1).sum())


def _default_parent() -> Path:
    in_checkout = (SOURCE_DIR / "tests").is_dir()
    return SOURCE_DIR / "runs" if in_checkout else Path.cwd()
