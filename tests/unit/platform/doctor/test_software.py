"""What is installed: every answer of every check, by readings made up for it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from headrace.platform.children import PartResult
from headrace.platform.doctor import software
from headrace.platform.doctor.check import Check, Status
from headrace.platform.doctor.readings import Gpu, TorchReading

H200 = Gpu("NVIDIA H200", (9, 0), 139.8, 139.0)
CPU, CUDA = TorchReading("2.13.0"), TorchReading("2.13.0", cuda="13.0", nccl="2.28.9", gpus=[H200])


def part(*rows: dict[str, Any], failure: str | None = None) -> PartResult:
    return PartResult(rows, failure, 1.0)


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10), Status.fail), ((3, 11), Status.passed), ((3, 13), Status.passed), ((3, 14), Status.warn)],
)
def test_python(version: tuple[int, int], status: Status) -> None:
    assert software.check_python(version).status is status


def test_packages() -> None:
    required = [Requirement("torch>=2.11,<2.14"), Requirement("nvidia_dali.cuda130>=2.4")]
    lock = {"torch": "2.13.0", "nvidia-dali-cuda130": "2.4.0"}

    def check(**installed: str) -> Check:
        return software.check_packages(required, lock, {k.replace("_", "-"): v for k, v in installed.items()})

    assert check(torch="2.13.0+cpu", nvidia_dali_cuda130="2.4.0").status is Status.passed
    missing = check(torch="2.13.0")
    assert missing.status is Status.fail
    assert "nvidia_dali.cuda130>=2.4" in missing.found
    outside = check(torch="2.14.0+cu130", nvidia_dali_cuda130="2.4.0")
    assert outside.status is Status.fail
    assert "torch 2.14.0+cu130 (wanted <2.14,>=2.11)" in outside.found
    differs = check(torch="2.11.0", nvidia_dali_cuda130="2.4.0")
    assert differs.status is Status.warn
    assert "torch 2.11.0 (lock: 2.13.0)" in differs.found
    lock["scipy"] = "1.0"
    assert "scipy absent (lock: 1.0)" in check(torch="2.13.0", nvidia_dali_cuda130="2.4.0").found
    lock.clear()
    assert "no lock file" in check(torch="2.11.0", nvidia_dali_cuda130="2.4.0").found


def test_packages_of_this_environment(repo_root: Path) -> None:
    required, lock, installed = software.read_required(), software.read_lock(), software.read_installed()
    assert {"torch", "ray", "nvidia-dali-cuda130"} <= {item.name for item in required}
    assert not any("flash-attn" in item.name for item in required)
    assert lock["torch"] == next(
        line.split("==")[1] for line in (repo_root / "requirements.lock").read_text().splitlines() if "torch==" in line
    )
    assert installed["pytest"] == pytest.__version__
    assert software.check_packages(required, lock, installed).status is not Status.fail
    assert software.read_lock(Path("/nowhere")) == {}


def test_torch() -> None:
    assert software.check_torch(CPU, None, has_driver=False).status is Status.passed
    assert software.check_torch(CUDA, None, has_driver=True).found == "2.13.0, CUDA 13.0 build"
    assert software.check_torch(CPU, None, has_driver=True).status is Status.warn
    broken = software.check_torch(None, "ImportError: libfoo", has_driver=False)
    assert broken.status is Status.fail
    assert "libfoo" in broken.found


def test_collectives() -> None:
    gloo, nccl = (
        part({"what": "collective", "backend": name, "s": s, "interface": interface})
        for name, s, interface in (("gloo", 0.1, "eth7"), ("nccl", 1.5, "=eth7"))
    )
    assert "gloo works over eth7" in software.check_collectives(CPU, gloo).found
    assert software.check_collectives(CUDA, nccl).found == "2.28.9 over =eth7; first result after 1.50 s"
    without = TorchReading("2.13.0", cuda="13.0", gpus=[H200])
    assert software.check_collectives(without, nccl).status is Status.fail
    failed = software.check_collectives(CPU, part({"what": "collective", "error": "no such host"}))
    assert failed.status is Status.fail
    assert "no such host" in failed.found
    for torch in (None, CPU):
        assert "killed" in software.check_collectives(torch, part(failure="killed by SIGSEGV: x")).found
    pair = TorchReading("2.13.0", cuda="13.0", nccl="2.28.9", peer_access=False, gpus=[H200, H200])
    assert software.check_collectives(pair, nccl).status is Status.warn


def test_dali() -> None:
    assert software.check_dali(part({"what": "dali", "version": "2.4.0"})).status is Status.passed
    broken = software.check_dali(part(failure="ModuleNotFoundError: No module named 'nvidia'"))
    assert broken.status is Status.fail
    assert "data.loader=memmap" in broken.remedy


def test_kvikio() -> None:
    assert software.check_kvikio(None).status is Status.passed
    assert software.check_kvikio(part({"what": "kvikio", "version": "26.10", "error": ""})).found == "26.10"
    broken = software.check_kvikio(part({"what": "kvikio", "version": None, "error": "no libcufile"}))
    assert broken.status is Status.warn
    assert "no libcufile" in broken.found
    assert software.check_kvikio(part(failure="not done after 20 s")).status is Status.warn


def test_a_checkout_that_is_not_installed_reads_its_own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert {"ray", "torch"} <= {item.name for item in software.read_required()}
