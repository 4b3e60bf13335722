"""The whole diagnosis: nothing is lost where a part or a check breaks, and the exit code follows the checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.platform.children import PartResult
from headrace.platform.doctor import diagnosis, machine
from headrace.platform.doctor.check import Status, fail, passed, warn
from headrace.platform.doctor.diagnosis import diagnose, exit_code

NAMES = [
    *("python", "packages", "host memory", "free disk", "ray token", "ray ports", "torch", "gpu", "driver", "nccl"),
    *("locked memory", "/dev/shm", "huge pages", "host copy", "gemm", "dali", "disk", "rates", "gds", "kvikio"),
]
H200_ROW = {"name": "NVIDIA H200", "capability": [9, 0], "total_gib": 139.8, "free_gib": 139.0}
TORCH_ROW = {
    "what": "torch",
    "version": "2.13.0",
    "cuda": "13.0",
    "cuda_error": "",
    "gpus": [H200_ROW],
    "driver_cuda": [13, 0],
    "nccl": "2.28.9",
    "peer_access": None,
}
ROWS = {
    "torch": (
        TORCH_ROW,
        {"what": "host_copy", "gbps": 12.0},
        {"what": "gemm", "dtype": "bfloat16", "tflops": 700.0},
        {"what": "collective", "backend": "nccl", "s": 1.0, "interface": "=eth7"},
        {"what": "pin", "pin_s": 0.2},
    ),
    "dali": ({"what": "dali", "version": "2.4.0"},),
    "disk": ({"what": "disk", "direct": True, "write_gbps": 3.0, "read_gbps": 6.0},),
    "gds": ({"what": "kvikio", "version": "26.10", "error": ""}, {"what": "engine", "real": True, "why": "counted"}),
}


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_driver_version", lambda: "580.95.05")
    monkeypatch.setattr(machine, "read_pci_gpus", lambda: 1)


def test_a_machine_with_a_gpu(gpu_machine: None, tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str, words: Sequence[str]) -> PartResult:
        asked.append(name)
        assert tuple(words) == {"torch": ("eth7",), "dali": ()}.get(name, (str(tmp_path),))
        return PartResult(ROWS[name], None, 1.0)

    checks = {check.name: check for check in diagnose(tmp_path, interface="eth7", environment={}, read=read)}
    assert list(checks) == NAMES
    assert asked == ["torch", "dali", "disk", "gds"]
    assert {checks[n].status for n in ("gpu", "driver", "nccl", "gemm", "gds", "kvikio", "dali")} == {Status.passed}


def test_every_part_that_dies_is_named_and_the_rest_goes_on(gpu_machine: None, tmp_path: Path) -> None:
    checks = {
        check.name: check
        for check in diagnose(
            tmp_path, environment={}, read=lambda name, words: PartResult((), f"{name} fell over", 1.0)
        )
    }
    assert list(checks) == NAMES
    for name, part in (("torch", "torch"), ("nccl", "torch"), ("gemm", "torch"), ("dali", "dali"), ("disk", "disk")):
        assert checks[name].status is Status.fail
        assert f"{part} fell over" in checks[name].found
    assert exit_code(list(checks.values())) == 1


def test_a_check_that_breaks_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd() -> None:
        raise KeyError("a new kernel writes it differently")

    monkeypatch.setattr(machine, "read_memlock_bytes", odd)
    checks = {
        check.name: check
        for check in diagnose(tmp_path, environment={}, read=lambda name, _: PartResult(ROWS[name], None, 1.0))
    }
    assert list(checks) == NAMES
    assert checks["locked memory"].status is Status.fail
    assert "a new kernel writes it differently" in checks["locked memory"].found


def test_exit_code() -> None:
    assert exit_code([passed("a", "b"), warn("a", "b", "c")]) == 0
    assert exit_code([passed("a", "b"), fail("a", "b", "c")]) == 1
    assert exit_code([]) == 0


def test_the_limits_are_those_of_the_parts() -> None:
    from headrace.platform.doctor.readings import PARTS

    assert set(diagnosis.LIMITS_S) == set(PARTS) == set(ROWS)
