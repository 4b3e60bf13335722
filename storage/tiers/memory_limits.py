"""How much memory this process may still take: the machine's, and that of its control groups (v1 and v2)."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
# How the memfds of host slabs begin: by it every process finds those of the others.
MEMFD_NAME = "headrace-slab-"
GIB = 1024**3
# Means no bound where a number is needed.
UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class MemoryLimit:
    """The tightest bound found, and its source."""

    available_bytes: int
    source: str


def available_memory(*, proc: Path = Path("/proc"), cgroups: Path = CGROUP_ROOT, grows: bool = False) -> MemoryLimit:
    """The least of MemAvailable and what every control group of this process has left.

    A group's page cache counts as left: the kernel gives it up before it kills. What host slabs of this user have
    reserved and not allocated yet counts as taken.

    Args:
        proc / cgroups: where /proc and the control groups are mounted.
        grows: the machine's memory grows as it is used (tiers.host.memory_grows): MemAvailable is no bound.
    """
    least = memory_left(proc=proc, cgroups=cgroups, grows=grows)
    reserved = reserved_bytes(proc=proc)
    if reserved == 0 or least.available_bytes >= UNBOUNDED:
        return least
    source = f"{least.source}, less {reserved / GIB:.2f} GiB reserved for host slabs that are not allocated yet"
    return replace(least, available_bytes=max(0, least.available_bytes - reserved), source=source)


def memory_left(*, proc: Path = Path("/proc"), cgroups: Path = CGROUP_ROOT, grows: bool = False) -> MemoryLimit:
    """What is left at this moment, as available_memory says it, reserved or not. It reads a few small files."""
    free = MemoryLimit(_meminfo(proc / "meminfo"), "free memory (MemAvailable)")
    limits = [MemoryLimit(UNBOUNDED, "memory that grows as it is used") if grows else free]
    for folder in _groups(proc / "self/cgroup", cgroups):
        limit = _left(folder)
        if limit is not None:
            limits.append(limit)
    return min(limits, key=lambda limit: limit.available_bytes)


def reserved_bytes(*, proc: Path = Path("/proc")) -> int:
    """Bytes of host slabs on this machine that are not allocated yet, of all processes whose files we may see.

    A slab has its whole size from the start, and its pages come when ranks touch them: what is missing still looks like
    free memory.
    """
    missing: dict[int, int] = {}
    for folder in proc.glob("[0-9]*/fd"):
        with suppress(OSError):  # another user's process, or one that has just ended
            for entry in os.scandir(folder):
                with suppress(OSError):
                    if os.readlink(entry.path).startswith(f"/memfd:{MEMFD_NAME}"):
                        found = os.stat(entry.path)
                        missing[found.st_ino] = max(0, found.st_size - 512 * found.st_blocks)
    return sum(missing.values())


def locked_memory_limit() -> int | None:
    """RLIMIT_MEMLOCK of this process in bytes; None where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def locked_memory_remedy(num_bytes: int) -> str:
    """What to do when the driver refuses to page-lock `num_bytes`: the end of an error message.

    The limit alone is no reason to refuse: the drivers of today page-lock beyond it.
    """
    limit = locked_memory_limit()
    if limit is None or limit >= num_bytes:
        return "give the container more memory; the locked-memory limit is not the reason, it is large enough"
    return (
        f"raise the locked-memory limit, which is {limit / GIB:.3f} GiB (`ulimit -l unlimited`, "
        "`docker run --ulimit memlock=-1`, LimitMEMLOCK=infinity for systemd), and the memory of the container"
    )


def _meminfo(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no MemAvailable")


def _groups(path: Path, root: Path) -> list[Path]:
    """Folders of this process's memory groups and of all their parents; a container sees its own group as the root."""
    folders: list[Path] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        group = base / name.lstrip("/")
        folders += [group, *(p for p in group.parents if p == base or base in p.parents)]
        folders.append(base)
    return list(dict.fromkeys(folders))


def _left(folder: Path) -> MemoryLimit | None:
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            text = (folder / limit_name).read_text().strip()
            if text == "max":
                return None
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))
        left = int(text) - usage + cache
        return MemoryLimit(max(left, 0), f"control group limit ({folder / limit_name})")
    return None
