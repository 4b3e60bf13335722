"""Checks of what is installed: Python, packages against the lock, torch, DALI, KvikIO, the collectives."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from headrace.platform.children import PartResult
from headrace.platform.doctor.check import Check, fail, passed, warn
from headrace.platform.doctor.readings import TorchReading
from headrace.platform.tracking.provenance import SOURCE_DIR

OLDEST_PYTHON, NEWEST_TRIED_PYTHON = (3, 11), (3, 13)
SET_UP_AGAIN = "remove .venv and run `make setup`"


def check_python(version: tuple[int, int]) -> Check:
    """The interpreter against what headrace is written for."""
    found = ".".join(map(str, version))
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        return fail("python", found, f"use {oldest} or newer: `PYTHON=python3.12 make setup`")
    if version > NEWEST_TRIED_PYTHON:
        newest = ".".join(map(str, NEWEST_TRIED_PYTHON))
        return warn(
            "python", found, f"headrace was tested with {oldest} to {newest}: `PYTHON=python{newest} make setup`"
        )
    return passed("python", found)


def read_lock(path: Path = SOURCE_DIR / "requirements.lock") -> dict[str, str]:
    """Package name -> version of the lock file; empty where there is none (an installed wheel)."""
    if not path.is_file():
        return {}
    pairs = (line.split("==") for line in path.read_text().splitlines() if "==" in line and not line.startswith("#"))
    return {_plain(name): version.strip() for name, version in pairs}


def read_required() -> list[Requirement]:
    """The requirements of headrace without its extras; of a checkout that is not installed, by its pyproject.toml."""
    try:
        texts = metadata.requires("headrace") or []
    except metadata.PackageNotFoundError:
        texts = tomllib.loads((SOURCE_DIR / "pyproject.toml").read_text())["project"]["dependencies"]
    required = [Requirement(text) for text in texts]
    return [item for item in required if item.marker is None or item.marker.evaluate({"extra": ""})]


def read_installed() -> dict[str, str]:
    """Every installed package and its version."""
    return {_plain(item.metadata["Name"]): item.version for item in metadata.distributions() if item.metadata["Name"]}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def check_packages(required: Sequence[Requirement], lock: Mapping[str, str], installed: Mapping[str, str]) -> Check:
    """What is installed against what headrace requires (fail) and what the lock pins (warn); keys in plain form."""
    missing = [str(item) for item in required if _plain(item.name) not in installed]
    if missing:
        return fail("packages", f"missing: {_some(missing)}", SET_UP_AGAIN)
    outside = [
        f"{item.name} {installed[_plain(item.name)]} (wanted {item.specifier})"
        for item in required
        if not item.specifier.contains(installed[_plain(item.name)].split("+")[0], prereleases=True)
    ]
    if outside:
        return fail("packages", f"outside of the supported versions: {_some(outside)}", SET_UP_AGAIN)
    if not lock:
        return passed("packages", f"{len(required)} requirements are met (no lock file beside this installation)")
    differ = [
        f"{name} {installed[name]} (lock: {version})"
        for name, version in lock.items()
        if name in installed and Version(installed[name].split("+")[0]) != Version(version)
    ]
    absent = [f"{name} absent (lock: {version})" for name, version in lock.items() if name not in installed]
    if differ or absent:
        return warn("packages", f"other versions than in the lock file: {_some(differ + absent)}", SET_UP_AGAIN)
    return passed("packages", f"all {len(lock)} packages of the lock file have the pinned version")


def _some(items: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def check_torch(torch: TorchReading | None, failure: str | None, *, has_driver: bool) -> Check:
    """Whether torch can be imported, and whether its build fits a machine with an NVIDIA driver."""
    if torch is None:
        return fail("torch", f"cannot be imported: {failure}", SET_UP_AGAIN)
    build = "CPU build" if torch.cuda is None else f"CUDA {torch.cuda} build"
    found = f"{torch.version}, {build}"
    if has_driver and torch.cuda is None:
        return warn(
            "torch", f"{found}, on a machine with an NVIDIA driver", "install the CUDA build of the same version"
        )
    return passed("torch", found)


def check_collectives(torch: TorchReading | None, part: PartResult) -> Check:
    """NCCL where there is a GPU, gloo elsewhere: one rank has reduced with itself."""
    row = part.find(what="collective")
    gpus = torch.gpus if torch else []
    if gpus and torch and torch.nccl is None:
        return fail("nccl", "this torch has none", "install a CUDA build of torch")
    if torch is None:
        return fail("nccl", f"could not be tried: {part.failure}", "see the line `torch`")
    if row is None or "error" in row:
        return fail(
            "nccl",
            f"a one-rank all-reduce failed: {row['error'] if row else part.failure}",
            "name an interface that works with cluster.interface=NAME, here and in runs; NCCL_DEBUG=INFO says more",
        )
    if not gpus or torch is None:
        return passed(
            "nccl",
            f"not needed without a GPU; {row['backend']} works over {row['interface']} "
            f"({row['s']:.2f} s to the first result)",
        )
    if torch.peer_access is False:
        return warn(
            "nccl",
            f"{torch.nccl}; not every pair of the {len(gpus)} GPUs can copy directly",
            "collectives go through host memory: see `nvidia-smi topo -m`; in a virtual machine or container, ask for "
            "peer access",
        )
    return passed("nccl", f"{torch.nccl} over {row['interface']}; first result after {row['s']:.2f} s")


def check_dali(part: PartResult) -> Check:
    """DALI, the default loader of token rows."""
    row = part.find(what="dali")
    if row is None:
        remedy = f"{SET_UP_AGAIN}, or train with data.loader=memmap (the same batches)"
        return fail("dali", f"does not work: {part.failure}", remedy)
    return passed("dali", str(row["version"]))


def check_kvikio(part: PartResult | None) -> Check:
    """KvikIO, which GPUDirect Storage needs; `part` is None on a machine without a GPU."""
    if part is None:
        return passed("kvikio", "not needed without a GPU")
    row = part.find(what="kvikio")
    if row is None or row["error"]:
        return warn(
            "kvikio",
            f"cannot be imported: {row['error'] if row else part.failure}",
            "`make setup` installs it where a driver is present (pip install --no-deps -r requirements-gds.lock); "
            "without it the ssd tier uses its page-locked ring",
        )
    return passed("kvikio", str(row["version"]))
