"""What Ray finds in its environment when we start it. No Ray."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

# Control messages and reports only: tensors never pass through the object store. Ray's least is 75 MiB.
OBJECT_STORE_BYTES = 96 * 1024**2
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # An actor that asks for no GPU keeps CUDA_VISIBLE_DEVICES as it is; Ray warns where this is not said.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's default of 15 lets its own agents, and everybody else, run before the ranks.
    "RAY_worker_niceness": "0",
    # Ray kills ranks when 95 % of a node's memory are used, host slabs included: of 2 TB that would waste 100 GB. A
    # guard of our own ends them with a checkpoint (workers/actors/memory_guard.py). 0 switches Ray's off.
    "RAY_memory_monitor_refresh_ms": "0",
    # How often a process sends its metrics on. With Ray's 10 s an alert would be later than two scrapes.
    "RAY_metrics_report_interval_ms": "2000",
}


# Ray's word for platforms without clusters: every server of a node then listens on 127.0.0.1, metrics included.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def use_loopback_only() -> None:
    """Make the Ray that this process starts or joins use 127.0.0.1 only: one node, which others cannot reach."""
    os.environ.update(LOOPBACK)
    if "ray" in sys.modules:  # it has read the variable
        setattr(importlib.import_module("ray._private.ray_constants"), "ENABLE_RAY_CLUSTER", False)  # noqa: B010


def ray_environment() -> dict[str, str]:
    """The environment for a Ray that we start as a command."""
    return {**SETTINGS, **os.environ}


def set_ray_environment() -> None:
    """The same for a Ray that this process starts; what the user has set stays. Before Ray is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def plasma_directory(shm: Path = Path("/dev/shm")) -> str | None:
    """A folder for the object store where /dev/shm is too small (a container's default is 64 MiB); else None."""
    try:
        found = os.statvfs(shm)
    except OSError:
        return "/tmp"
    return None if found.f_bavail * found.f_frsize >= 2 * OBJECT_STORE_BYTES else "/tmp"
