"""What produced a number: commit, versions, machine. No mlflow, no torch import of its own."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("headrace", "torch", "triton", "ray", "mlflow", "transformers", "nvidia-dali-cuda130", "kvikio-cu13")
SOURCE_DIR = Path(__file__).resolve().parents[2]
GIB = 1024**3


@dataclass(frozen=True)
class Provenance:
    """Where a run or a benchmark row comes from.

    Args:
        commit: full hash of the source, "unknown" outside of a checkout (HEADRACE_COMMIT may name it).
        dirty: whether tracked files differ from it; None if it is unknown.
        versions: of Python and of the packages that numbers depend on; absent packages are left out.
        machine: cpu, cores, memory_gib, gpus (name, memory and driver, as nvidia-smi says), host, system.
    """

    commit: str
    dirty: bool | None
    versions: Mapping[str, str]
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


@lru_cache(maxsize=1)
def provenance() -> Provenance:
    """Read once per process: about 30 ms, one second where there is an NVIDIA driver."""
    commit, dirty = source_state(SOURCE_DIR)
    return Provenance(commit, dirty, package_versions(), machine())


def source_state(folder: Path) -> tuple[str, bool | None]:
    """Commit of the checkout whose root is `folder`, and whether tracked files differ from it."""
    named = os.environ.get("HEADRACE_COMMIT")
    top = _command("git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD").split()
    # A wheel that is installed inside another project's checkout is not that checkout.
    if len(top) != 2 or Path(top[0]).resolve() != folder:
        return named or "unknown", None
    changed = _command("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return top[1], bool(changed)


def package_versions() -> dict[str, str]:
    """Installed versions, read from the packages' metadata: nothing is imported."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """CPU, memory and GPUs of this node."""
    query = "--query-gpu=name,memory.total,driver_version"
    gpus = _command("nvidia-smi", query, "--format=csv,noheader").splitlines()
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [line.strip() for line in gpus if line.strip()],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _command(*words: str) -> str:
    """Standard output of a command; nothing where it is missing, slow or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
