"""The drive: every answer of every check, by readings made up for it."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.platform.children import PartResult
from headrace.platform.doctor import drive
from headrace.platform.doctor.check import GIB, Status


def part(*rows: dict[str, Any], failure: str | None = None) -> PartResult:
    return PartResult(rows, failure, 1.0)


@pytest.mark.parametrize(
    ("free", "status"),
    [(None, Status.fail), (GIB - 1, Status.fail), (5 * GIB, Status.warn), (20 * GIB, Status.passed)],
)
def test_free_disk(free: int | None, status: Status) -> None:
    check = drive.check_free_disk("/data", free)
    assert check.status is status
    assert "/data" in check.found


@pytest.mark.parametrize(
    ("direct", "write", "read", "has_gpu", "status"),
    [
        (True, 3.0, 6.0, True, Status.passed),
        (True, 0.9, 6.0, True, Status.warn),
        (True, 6.0, 0.9, True, Status.warn),
        (True, 0.9, 0.9, False, Status.passed),
        (True, 0.09, 0.9, False, Status.warn),
        (False, 3.0, 6.0, True, Status.warn),
    ],
)
def test_disk(direct: bool, write: float, read: float, has_gpu: bool, status: Status) -> None:
    row = {"what": "disk", "direct": direct, "write_gbps": write, "read_gbps": read}
    assert drive.check_disk(part(row), has_gpu=has_gpu).status is status


def test_a_drive_that_was_not_measured() -> None:
    slow = drive.check_disk(part(failure="not done after 8 s"), has_gpu=False)
    assert slow.status is Status.warn
    assert "not done after 8 s" in slow.found
    refused = drive.check_disk(part(failure="PermissionError: no"), has_gpu=False)
    assert refused.status is Status.fail
    assert "PermissionError" in refused.found


def test_gds() -> None:
    assert drive.check_gds(None).status is Status.passed
    assert drive.check_gds(part({"what": "engine", "got": "gds", "real": True, "why": "moved"})).status is Status.passed
    ring = drive.check_gds(part({"what": "engine", "got": "ring", "real": False, "why": "no nvidia-fs"}))
    assert ring.status is Status.warn
    assert "`ring`: no nvidia-fs" in ring.found
    assert drive.check_gds(part({"what": "kvikio"}, failure="MachineError: full")).status is Status.fail
