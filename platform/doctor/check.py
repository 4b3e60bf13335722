"""One line of the doctor's answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

GIB = 2**30


class Status(StrEnum):
    """passed: as it should be; warn: works, but not as well or as safely as it could; fail: runs will break."""

    passed = "pass"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True)
class Check:
    """What one check found.

    Args:
        name: what was looked at.
        found: what is there, with units.
        remedy: what to do about it; empty where the check passed.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.status is Status.passed) == (not self.remedy), "a remedy goes with a warning or a failure"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "status": self.status.value, "found": self.found, "remedy": self.remedy}


def passed(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, Status.passed, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """Worth a look; the exit code stays 0."""
    return Check(name, Status.warn, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """Must be mended; the exit code becomes 1."""
    return Check(name, Status.fail, found, remedy)
