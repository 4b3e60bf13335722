"""The profile: each part within its limit and the whole within three minutes; what failed or was left out is said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.platform.children import PartResult, run_part
from headrace.platform.doctor import machine_profile
from headrace.platform.doctor.machine_profile import PARTS, TOTAL_S, hardware_fields, measure


def test_the_parts_fit_into_three_minutes() -> None:
    assert sum(part.limit_s for part in PARTS.values()) <= TOTAL_S <= 180


def test_a_part_that_fails_loses_nothing_of_the_others(tmp_path: Path) -> None:
    def run(name: str, words: Sequence[str], limit_s: float) -> PartResult:
        assert words == [str(tmp_path), str(limit_s)]
        return PartResult(({"what": name},), "CUDA error: an illegal address" if name == "gemm" else None, 1.0)

    told: list[str] = []
    rows, left_out = measure(tmp_path, has_gpu=True, run=run, on_part=told.append)
    assert [row["what"] for row in rows if row["what"] != "part"] == list(PARTS)
    assert left_out == {"gemm": "CUDA error: an illegal address"}
    assert len(told) == len(PARTS)
    assert "illegal address" in told[1]


def test_without_a_gpu_its_parts_are_named_and_not_run(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(name: str, words: Sequence[str], limit_s: float) -> PartResult:
        ran.append(name)
        return PartResult((), None, 1.0)

    _, left_out = measure(tmp_path, has_gpu=False, run=run)
    assert ran == ["host_memory", "host", "disk"]
    assert left_out == dict.fromkeys(("copy", "gemm", "gds", "pin"), "no GPU")


def test_time_that_is_over_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(machine_profile, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limits: dict[str, float] = {}

    def run(name: str, words: Sequence[str], limit_s: float) -> PartResult:
        limits[name] = limit_s
        now[0] += 56.0  # the kill itself can take long, too
        return PartResult((), None, 56.0)

    _, left_out = measure(tmp_path, has_gpu=True, run=run)
    assert list(limits) == ["copy", "gemm", "host_memory", "host"]
    assert limits["host"] == pytest.approx(min(PARTS["host"].limit_s, TOTAL_S - 168))
    assert set(left_out) == {"disk", "gds", "pin"}


def rows_of_an_h200() -> list[dict[str, Any]]:
    return [
        {"what": "device", "name": "NVIDIA H200", "memory_gib": 139.81},
        {"what": "copy", "memory": "pageable", "direction": "h2d", "gbps": 9.0},
        {"what": "copy", "memory": "pinned", "direction": "h2d", "gbps": 55.123},
        {"what": "copy", "memory": "pinned", "direction": "d2h", "gbps": 53.0},
        {"what": "copy", "memory": "pinned", "direction": "h2d+d2h together", "gbps": 90.0},
        {"what": "copy", "memory": "device", "direction": "d2d (read and written)", "gbps": 4123.46},
        {"what": "gemm", "dtype": "bfloat16", "n": 1024, "tflops": 200.0},
        {"what": "gemm", "dtype": "bfloat16", "n": 8192, "tflops": 712.34},
        {"what": "gemm", "dtype": "float32", "n": 4096, "tflops": 51.0},
        {"what": "cpu_gemm", "dtype": "float32", "tflops": 1.0},
        {"what": "host_copy", "gbps": 11.0},
        {"what": "host_memory", "mem_total_gib": 20.0},
        {"what": "disk", "direct": True, "write_gbps": 2.5, "read_gbps": 5.5, "folder_free_gib": 60.0},
        {"what": "pin", "gib": 16, "mem_total_gib_after": 125.5},
    ]


def test_fields_of_a_gpu_machine() -> None:
    assert hardware_fields(rows_of_an_h200()) == {
        "bf16_tflops": 712.3,
        "fp32_tflops": 51.0,
        "h2d_gbps": 55.1,
        "d2h_gbps": 53.0,
        "memory_gbps": 4123.5,
        "ssd_write_gbps": 2.5,
        "ssd_read_gbps": 5.5,
        "ssd_gib": 60.0,
        "host_gib": 125.5,
        "device_memory_gib": 139.8,
    }


def test_what_was_not_measured_is_left_out() -> None:
    assert hardware_fields([]) == {}
    without_copy = [row for row in rows_of_an_h200() if row["what"] != "copy"]
    assert "h2d_gbps" not in hardware_fields(without_copy)  # a copy within host memory is not the link
    through_cache = [{"what": "disk", "direct": False, "write_gbps": 9.0, "read_gbps": 9.0, "folder_free_gib": 1.0}]
    assert hardware_fields(through_cache) == {}


def test_fields_of_a_machine_without_a_gpu() -> None:
    rows = [row for row in rows_of_an_h200() if row["what"] in ("cpu_gemm", "host_copy")]
    assert hardware_fields(rows) == {"fp32_tflops": 1.0, "h2d_gbps": 11.0, "d2h_gbps": 11.0}


def test_a_part_runs_in_its_own_process() -> None:
    part = run_part("headrace.platform.doctor.machine_profile", ["host_memory", "/tmp", "10"], limit_s=600)
    assert part.failure is None
    assert [row["what"] for row in part.rows] == ["host_memory"]


def test_the_drive_is_measured_for_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def disk_rates(folder: str, num_bytes: int) -> list[dict[str, Any]]:
        asked.append(num_bytes)
        return [{"what": "disk", "bytes": num_bytes, "write_gbps": 1.0, "read_gbps": 2.0}]

    monkeypatch.setattr(machine_profile, "disk_rates", disk_rates)
    for limit_s, most in (("1000", 8 * 2**30), ("10", 3 * 10**9)):
        asked.clear()
        (row,) = machine_profile._disk("/tmp", limit_s)
        assert row["bytes"] == asked[-1] == pytest.approx(most, rel=0.01)
    (row,) = machine_profile._disk("/tmp", "1")
    assert row["bytes"] == 2**28
