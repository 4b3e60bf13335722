"""What a profile leaves open, asked of the machine at hand: memory, space, and quickly measured rates. No torch.

The CPU's profile is open everywhere, because "cpu" is any machine. Rates are rough (best of a few short tries); they
are there so that a plan can say seconds. They are measured once and kept (RateBook).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from headrace.platform.doctor.host_rates import disk_rates
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.tiers.memory_limits import UNBOUNDED, available_memory
from headrace.workers.telemetry.rate_book import RateBook

GIB = 1024**3
GEMM_SIZE = 768
COPY_BYTES = 32 * 1024**2


def fill_in(
    profile: HardwareProfile, ssd_folders: Sequence[Path], *, book: RateBook, memory_grows: bool = False
) -> HardwareProfile:
    """The profile with its open values taken from this machine; what it states already stands.

    Host memory and the drive are this machine's for any profile: call it where the run will be. Rates of the device
    are measured for the cpu profile alone. A drive that cannot be measured stays unknown.

    Args:
        ssd_folders: where slab files will be; each, or its nearest parent that exists, names a drive. Several are used
            in equal parts, so the smallest and the slowest of them decide.
        book: keeps rates from one run to the next.
        memory_grows: what is free now says nothing about host memory; what control groups allow still does.
    """
    drives = drives_of(ssd_folders)
    found: dict[str, float | None] = {}
    if profile.host_gib is None:
        there = available_memory(grows=memory_grows).available_bytes
        found["host_gib"] = None if there >= UNBOUNDED else there / GIB
    if profile.ssd_gib is None:
        spaces = [os.statvfs(folder) for folder in drives]
        found["ssd_gib"] = len(drives) * min(space.f_bavail * space.f_frsize for space in spaces) / GIB
    if profile.ssd_write_gbps is None or profile.ssd_read_gbps is None:
        rates = [book.rates(f"drive {mount_of(folder)}", lambda f=folder: drive_gbps(f)) for folder in drives]  # type: ignore[misc]
        write, read = zip(*rates, strict=True)
        found["ssd_write_gbps"] = profile.ssd_write_gbps or _together(write)
        found["ssd_read_gbps"] = profile.ssd_read_gbps or _together(read)
    if profile.device_class is DeviceClass.cpu:
        if profile.fp32_tflops is None:
            (found["fp32_tflops"],) = book.rates("gemm", lambda: [gemm_tflops()])
        copy = profile.d2h_gbps
        if profile.d2h_gbps is None or profile.h2d_gbps is None:
            (copy,) = book.rates("copy", lambda: [copy_gbps()])
            found |= {"d2h_gbps": profile.d2h_gbps or copy, "h2d_gbps": profile.h2d_gbps or copy}
        if profile.memory_gbps is None and copy is not None:
            found["memory_gbps"] = 2 * copy  # it reads and writes
    return replace(profile, **found)  # type: ignore[arg-type]


def check_ssd_path(folders: Sequence[str]) -> None:
    """Refuse folders of tiers.ssd.path that no slab file can be put in.

    Raises:
        InputError: names the key, the folder, why, and the remedy.
    """
    for text in folders:
        folder = Path(text).expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                continue
        except OSError as error:
            why = f"{there} is no folder" if not there.is_dir() else f"{there}: {error.strerror}"
        raise InputError(
            f"tiers.ssd.path={text}: cannot be used ({why}); name a writable folder on a local drive, or set "
            "tiers.ssd.budget_gib=0 to do without the drive",
            id=ErrorId.ssd_path_unusable,
        )


def drives_of(folders: Sequence[Path]) -> list[Path]:
    """One folder that exists for each file system that the folders are on, in their order."""
    there = [next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir()) for folder in folders]
    return list({folder.stat().st_dev: folder for folder in reversed(there)}.values())[::-1]


def mount_of(folder: Path) -> Path:
    """The top folder of the file system that a folder is on."""
    device = folder.stat().st_dev
    return next(p for p in (folder, *folder.parents) if p.parent == p or p.parent.stat().st_dev != device)


def _together(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return len(rates) * min(known) if len(known) == len(rates) else None


def gemm_tflops() -> float:
    """Best of a few fp32 matrix products on all cores."""
    a = np.random.default_rng(0).random((GEMM_SIZE, GEMM_SIZE), dtype=np.float32)
    out = np.empty_like(a)
    return 2 * GEMM_SIZE**3 / best_s(lambda: np.matmul(a, a, out=out), 5) / 1e12


def copy_gbps() -> float:
    """One thread's memory copy."""
    source, target = np.ones(COPY_BYTES, dtype=np.uint8), np.zeros(COPY_BYTES, dtype=np.uint8)
    return COPY_BYTES / best_s(lambda: np.copyto(target, source), 4) / 1e9


def drive_gbps(folder: Path) -> tuple[float | None, float | None]:
    """(write, read) of the folder's drive past the page cache; (None, None) where it takes no O_DIRECT or no file."""
    try:
        (row,) = disk_rates(str(folder), COPY_BYTES, num_tries=2)
    except OSError:
        return None, None
    return (row["write_gbps"], row["read_gbps"]) if row["direct"] else (None, None)


def best_s(work: Callable[[], object], num_tries: int) -> float:
    """Shortest wall seconds of several calls."""
    seconds = []
    for _ in range(num_tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
