"""Memory of a mapping: huge pages asked for, and all of it made present at once, by many cores. No torch.

Whether a memfd can come in huge pages (2 MiB on most machines) is a setting of the kernel, which is off on many
machines. Where it is on, one fault makes 2 MiB present instead of 4 KiB.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

SYS = Path("/sys")
SMAPS = Path("/proc/self/smaps")
SETTINGS = "kernel/mm/transparent_hugepage"
# What lets a mapping that asks for huge pages have them.
ON = frozenset({"always", "within_size", "advise", "force"})
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it


def memfd_setting(*, sys: Path = SYS) -> str:
    """The kernel's setting for memfds: "advise", "never", ...; "absent" where the kernel has no huge pages."""
    folder = sys / SETTINGS
    overall = _chosen(folder / "shmem_enabled")
    try:
        size_kib = int((folder / "hpage_pmd_size").read_text()) // 1024
    except (OSError, ValueError):
        return overall
    own = _chosen(folder / f"hugepages-{size_kib}kB/shmem_enabled")
    return overall if own in ("absent", "inherit") or overall in ("deny", "force") else own


def advise_huge(address: int, num_bytes: int) -> None:
    """Ask for huge pages. Raises OSError where the kernel has none."""
    _madvise(address, num_bytes, mmap.MADV_HUGEPAGE)


def populate(address: int, num_bytes: int) -> None:
    """Make the pages of a writable mapping present, without changing what is in them. Other threads go on meanwhile.

    Raises:
        OSError: ENOSPC where the file system or the machine has no page left; EINVAL before Linux 5.14.
    """
    try:
        _madvise(address, num_bytes, MADV_POPULATE_WRITE)
    except OSError as error:
        # The call says "bad address" where an access would end the process with SIGBUS.
        if error.errno in (errno.EFAULT, errno.ENOMEM):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def huge_bytes_in(address: int, num_bytes: int) -> int:
    """Bytes of a shared mapping which are present in huge pages. Its parts may differ in policy."""
    inside, found = False, 0
    with SMAPS.open() as lines:
        for line in lines:
            name = line.split(maxsplit=1)[0]
            if not name.endswith(":"):
                inside = address <= int(name.split("-")[0], 16) < address + num_bytes
            elif inside and name == "ShmemPmdMapped:":
                found += int(line.split()[1]) * 1024
    return found


def _chosen(path: Path) -> str:
    """The word in brackets of a setting such as "always [never]"."""
    try:
        text = path.read_text()
    except OSError:
        return "absent"
    return text.partition("[")[2].partition("]")[0] or "absent"


def _madvise(address: int, num_bytes: int, advice: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(address, num_bytes, advice) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
