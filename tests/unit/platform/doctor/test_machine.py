"""The machine: every answer of every check, by readings made up for it."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from headrace.platform.children import PartResult
from headrace.platform.doctor import machine
from headrace.platform.doctor.check import Check, Status
from headrace.platform.doctor.machine import GIB, MIB
from headrace.platform.doctor.readings import Gpu, TorchReading

H200 = Gpu("NVIDIA H200", (9, 0), 139.8, 139.0)
CPU = TorchReading("2.13.0")


def cuda(*gpus: Gpu, **values: Any) -> TorchReading:
    return TorchReading("2.13.0", cuda="13.0", gpus=list(gpus), **values)


def part(*rows: dict[str, Any], failure: str | None = None) -> PartResult:
    return PartResult(rows, failure, 1.0)


@pytest.mark.parametrize(
    ("torch", "driver", "num_pci", "status", "found"),
    [
        (cuda(H200), "580.1", 1, Status.passed, "NVIDIA H200 140 GiB"),
        (CPU, None, 0, Status.warn, "none"),
        (CPU, "580.1", 1, Status.fail, "torch sees none"),
        (CPU, None, 1, Status.fail, "there is a GPU"),
        (None, "580.1", 1, Status.fail, "torch could not be loaded to find out"),
        (cuda(cuda_error="driver too old"), "470.1", 1, Status.fail, "driver too old"),
        (cuda(H200, Gpu("Tesla T4", (7, 5), 15, 15)), "580.1", 2, Status.fail, "Tesla T4 has compute capability 7.5"),
        (cuda(H200, Gpu("NVIDIA H200", (9, 0), 140, 100)), "580.1", 2, Status.warn, "GPU 1 has 100.0 of 140.0 GiB"),
    ],
)
def test_gpu(torch: TorchReading | None, driver: str | None, num_pci: int, status: Status, found: str) -> None:
    check = machine.check_gpu(torch, driver=driver, num_pci=num_pci)
    assert check.status is status
    assert found in check.found


@pytest.mark.parametrize(
    ("torch", "driver", "num_pci", "status"),
    [
        (CPU, None, 0, Status.passed),
        (CPU, None, 1, Status.fail),
        (CPU, "580.1", 1, Status.passed),
        (cuda(H200, driver_cuda=(13, 0)), "580.1", 1, Status.passed),
        (cuda(H200, driver_cuda=(13, 2)), "590.1", 1, Status.passed),
        (cuda(H200, driver_cuda=(12, 8)), "570.1", 1, Status.warn),
        (cuda(driver_cuda=(12, 8)), "570.1", 1, Status.fail),
    ],
)
def test_driver(torch: TorchReading, driver: str | None, num_pci: int, status: Status) -> None:
    assert machine.check_driver(torch, driver=driver, num_pci=num_pci).status is status


@pytest.mark.parametrize(
    ("available", "status"), [(GIB - 1, Status.fail), (2 * GIB, Status.warn), (4 * GIB, Status.passed)]
)
def test_host_memory(available: int, status: Status) -> None:
    check = machine.check_host_memory(available, "a control group")
    assert check.status is status
    assert "a control group" in check.found


def test_locked_memory() -> None:
    pinned, refused = part({"what": "pin", "pin_s": 0.25}), part({"what": "pin", "error": "code 2"})
    assert machine.check_locked_memory(8 * MIB, None).found == "limit 8 MiB; nothing is page-locked without a GPU"
    assert machine.check_locked_memory(None, pinned).found == "unlimited; 1 GiB page-locked in 0.25 s"
    assert machine.check_locked_memory(8 * MIB, pinned).status is Status.warn
    assert machine.check_locked_memory(None, refused).status is Status.fail
    assert "code 2" in machine.check_locked_memory(8 * MIB, refused).found
    assert machine.check_locked_memory(None, part(failure="killed by SIGKILL: x")).status is Status.fail


@pytest.mark.parametrize(
    ("size_free", "num_gpus", "status"),
    [
        (None, 0, Status.fail),
        ((64 * MIB, 60 * MIB), 0, Status.fail),
        ((GIB, GIB), 1, Status.warn),
        ((GIB, GIB), 8, Status.fail),
        ((8 * GIB, 8 * GIB), 8, Status.passed),
        ((8 * GIB, 3 * GIB), 0, Status.passed),
        ((8 * GIB, GIB), 0, Status.warn),
    ],
)
def test_dev_shm(size_free: tuple[int, int] | None, num_gpus: int, status: Status) -> None:
    assert machine.check_dev_shm(size_free, num_gpus=num_gpus).status is status


@pytest.mark.parametrize(
    ("setting", "status"),
    [("advise", Status.passed), ("always", Status.passed), ("absent", Status.passed), ("never", Status.warn)],
)
def test_huge_pages(setting: str, status: Status) -> None:
    check = machine.check_huge_pages(setting)
    assert check.status is status
    assert ("shmem_enabled" in check.remedy) == (status is Status.warn)


def test_host_copy() -> None:
    assert machine.check_host_copy(part({"what": "host_copy", "gbps": 10.0})).found == "10.0 GB/s"
    assert machine.check_host_copy(part({"what": "host_copy", "gbps": 1.9})).status is Status.warn
    assert machine.check_host_copy(part({"what": "host_copy", "error": "no memory"})).status is Status.fail
    assert machine.check_host_copy(part(failure="gone")).status is Status.fail


def test_gemm() -> None:
    def check(torch: TorchReading | None, tflops: float) -> Check:
        row = {"what": "gemm", "dtype": "bfloat16", "tflops": tflops}
        return machine.check_gemm(torch, part(row), {"h200": 1000.0, "rtx4090": 165.0})

    assert check(cuda(H200), 700.0).found == "700 TFLOP/s bfloat16, 70 % of the datasheet"
    assert check(cuda(H200), 399.0).status is Status.warn
    assert check(cuda(Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24, 24)), 60.0).status is Status.warn
    assert check(cuda(Gpu("NVIDIA B300", (10, 3), 288, 288)), 60.0).status is Status.passed
    assert check(CPU, 0.1).status is Status.passed
    assert check(CPU, 0.004).status is Status.warn
    broken = machine.check_gemm(CPU, part({"what": "gemm", "error": "MachineError: no"}), {})
    assert broken.status is Status.fail
    assert machine.check_gemm(None, part(failure="gone"), {}).status is Status.fail


def test_what_is_read(tmp_path: Path) -> None:
    assert machine.read_driver_version(tmp_path / "version") is None
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (gcc)\n"
    )
    assert machine.read_driver_version(tmp_path / "version") == "580.95.05"
    for name, vendor, class_ in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1234", "0x030000")):
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "vendor").write_text(vendor + "\n")
        (tmp_path / "pci" / name / "class").write_text(class_ + "\n")
    assert machine.read_pci_gpus(tmp_path / "pci") == 1
    assert machine.read_pci_gpus(tmp_path / "nothing") == 0
    assert machine.read_dev_shm(tmp_path / "nothing") is None
    size_free = machine.read_dev_shm(tmp_path)
    assert size_free is not None
    assert size_free[0] >= size_free[1] > 0
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert machine.read_memlock_bytes() == (None if limit == resource.RLIM_INFINITY else limit)


def test_datasheet_rates_come_from_the_profiles(repo_root: Path, tmp_path: Path) -> None:
    assert machine.read_datasheet_tflops(repo_root / "conf/hardware")["h200"] == 989.4
    (tmp_path / "mine.yaml").write_text("evidence: measured\nbf16_tflops: 5.0\n")
    (tmp_path / "open.yaml").write_text("evidence: datasheet\nbf16_tflops: null\n")
    assert machine.read_datasheet_tflops(tmp_path) == {}
