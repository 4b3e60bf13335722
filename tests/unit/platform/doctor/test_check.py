"""A line of the doctor: a remedy goes with a warning or a failure, and with nothing else."""

from __future__ import annotations

import pytest

from headrace.platform.doctor.check import Check, Status, fail, passed, warn


def test_json_form() -> None:
    assert warn("disk", "slow", "another one").to_json() == {
        "name": "disk",
        "status": "warn",
        "found": "slow",
        "remedy": "another one",
    }
    assert passed("disk", "fast").to_json()["status"] == "pass"
    assert fail("disk", "none", "buy one").status is Status.fail


def test_a_remedy_is_wanted_exactly_where_something_is_wrong() -> None:
    with pytest.raises(AssertionError):
        Check("disk", Status.warn, "slow")
    with pytest.raises(AssertionError):
        Check("disk", Status.passed, "fast", "why then?")
