"""How much memory this process may still take: the machine's, and that of its control groups (v1 and v2)."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.storage.tiers.sweep import promised_bytes

CGROUP_ROOT = Path("/sys/fs/cgroup")
SHM = Path("/dev/shm")
GIB = 1024**3
# Stands for no bound where a number is wanted.
UNBOUNDED = 1 << 62


@dataclass(frozen=True)
class MemoryLimit:
    """The tightest bound found, and where it stands."""

    available_bytes: int
    source: str


def available_memory(
    *, proc: Path = Path("/proc"), cgroups: Path = CGROUP_ROOT, shm: Path = SHM, grows: bool = False
) -> MemoryLimit:
    """The least of MemAvailable and what every control group of this process has left.

    A group's page cache counts as left: the kernel gives it up before it kills. What other slabs of the node have
    promised and not touched yet counts as taken.

    Args:
        proc / cgroups: where /proc and the control groups are mounted.
        shm: where the slabs of the node are seen.
        grows: the machine's memory grows as it is used (tiers.host.memory_grows): MemAvailable is no bound.
    """
    least = memory_left(proc=proc, cgroups=cgroups, grows=grows)
    promised = promised_bytes(shm)
    if promised == 0:
        return least
    source = f"{least.source}, less {promised / GIB:.2f} GiB promised to slabs in {shm} that are being touched"
    return replace(least, available_bytes=max(0, least.available_bytes - promised), source=source)


def memory_left(*, proc: Path = Path("/proc"), cgroups: Path = CGROUP_ROOT, grows: bool = False) -> MemoryLimit:
    """What is left at this moment, as available_memory says it; promises do not count. It reads a few small files."""
    free = MemoryLimit(_meminfo(proc / "meminfo"), "free memory (MemAvailable)")
    limits = [MemoryLimit(UNBOUNDED, "memory that grows as it is used") if grows else free]
    for folder in _groups(proc / "self/cgroup", cgroups):
        limit = _left(folder)
        if limit is not None:
            limits.append(limit)
    return min(limits, key=lambda limit: limit.available_bytes)


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
