"""Takes all readings, quick ones first, and turns them into checks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from headrace.platform.children import PartResult, run_part
from headrace.platform.doctor import drive, machine, ray_setup, software
from headrace.platform.doctor.check import Check, Status, fail
from headrace.platform.doctor.readings import TorchReading
from headrace.storage.tiers.huge_pages import memfd_setting
from headrace.storage.tiers.memory_limits import available_memory
from headrace.workers.telemetry.rate_book import RateBook

READINGS = "headrace.platform.doctor.readings"
# Seconds after which a part is given up; each takes a fifth of that on two idle cores.
LIMITS_S = {"torch": 25.0, "dali": 10.0, "disk": 8.0, "gds": 20.0}
RunPart = Callable[[str, Sequence[str]], PartResult]
Look = tuple[str, Callable[[], Check]]


def exit_code(checks: Iterable[Check]) -> int:
    """1 where anything fails, else 0."""
    return int(any(check.status is Status.fail for check in checks))


def read_part(name: str, words: Sequence[str]) -> PartResult:
    """Run one part of readings.py in a process of its own."""
    return run_part(READINGS, [name, *words], limit_s=LIMITS_S[name])


def diagnose(
    folder: Path,
    *,
    interface: str | None = None,
    environment: Mapping[str, str] | None = None,
    read: RunPart = read_part,
) -> Iterator[Check]:
    """Yield every check as it is known. A check that raises an error is a failed check, and the others still run.

    Args:
        folder: where run folders or slab files would lie.
        interface: cluster.interface of a run; None: the one that a run takes without it.
        environment: None takes this process's.
        read: runs a part of readings.py.
    """
    environment = os.environ if environment is None else environment
    yield from _look(_quick(folder, environment))
    yield from _look(_measured(folder, interface, read))


def _look(looks: Iterable[Look]) -> Iterator[Check]:
    for name, check in looks:
        try:
            yield check()
        except Exception as error:  # a reading in an unexpected form
            yield fail(name, f"could not be checked: {type(error).__name__}: {error}", "please report this line")


def _quick(folder: Path, environment: Mapping[str, str]) -> list[Look]:
    """What files, limits and sockets say: milliseconds."""

    def memory() -> Check:
        limit = available_memory()
        return machine.check_host_memory(limit.available_bytes, limit.source)

    def free_disk() -> Check:
        return drive.check_free_disk(str(folder), shutil.disk_usage(folder).free if folder.is_dir() else None)

    def packages() -> Check:
        return software.check_packages(software.read_required(), software.read_lock(), software.read_installed())

    return [
        ("python", lambda: software.check_python(sys.version_info[:2])),
        ("packages", packages),
        ("host memory", memory),
        ("free disk", free_disk),
        ("ray token", lambda: ray_setup.check_ray_token(ray_setup.read_token(environment, Path.home()))),
        ("ray ports", lambda: ray_setup.check_ray_ports(ray_setup.read_ports(environment))),
    ]


def _measured(folder: Path, interface: str | None, read: RunPart) -> Iterator[Look]:
    """What torch, DALI, the drive and KvikIO say in processes of their own: seconds."""
    book = RateBook()  # it looks at the load, which the parts below raise
    driver, num_pci = machine.read_driver_version(), machine.read_pci_gpus()
    part = read("torch", () if interface is None else (interface,))
    row = part.find(what="torch")
    torch = TorchReading.from_row(row) if row else None
    num_gpus = len(torch.gpus) if torch else 0
    with_gpu = part if num_gpus else None
    yield "torch", lambda: software.check_torch(torch, part.failure, has_driver=driver is not None)
    yield "gpu", lambda: machine.check_gpu(torch, driver=driver, num_pci=num_pci)
    yield "driver", lambda: machine.check_driver(torch, driver=driver, num_pci=num_pci)
    yield "nccl", lambda: software.check_collectives(torch, part)
    yield "locked memory", lambda: machine.check_locked_memory(machine.read_memlock_bytes(), with_gpu)
    yield "/dev/shm", lambda: machine.check_dev_shm(machine.read_dev_shm(), num_gpus=num_gpus)
    yield "huge pages", lambda: machine.check_huge_pages(memfd_setting())
    yield "host copy", lambda: machine.check_host_copy(part)
    yield "gemm", lambda: machine.check_gemm(torch, part, machine.read_datasheet_tflops())
    yield "dali", lambda: software.check_dali(read("dali", ()))
    yield "disk", lambda: drive.check_disk(read("disk", (str(folder),)), has_gpu=num_gpus > 0)
    yield "rates", lambda: machine.check_rates(folder, book)
    gds = read("gds", (str(folder),)) if num_gpus else None
    yield "gds", lambda: drive.check_gds(gds)
    yield "kvikio", lambda: software.check_kvikio(gds)
