"""One S3 server for all tests of remote data, and a bucket and a cache of its own for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.helpers.s3 import Fault, Request, S3Server, s3_server
from headrace.storage.remote import folder

_BUCKETS = itertools.count()


@pytest.fixture(scope="session")
def running_server() -> Iterator[S3Server]:
    """Moto's server in a process."""
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(running_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server without faults, this process' environment set for it, and waits between attempts cut short."""
    for name, value in running_server.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(folder, "FIRST_WAIT_S", 1e-3)
    answer_truly(running_server)
    yield running_server
    answer_truly(running_server)


def answer_truly(server: S3Server) -> None:
    """No faults, nothing counted."""
    server.fault_of = lambda request: None
    server.requests.clear()


@pytest.fixture
def bucket() -> str:
    """A name that no other test uses."""
    return f"bucket-{next(_BUCKETS)}"


@pytest.fixture
def fail_first(s3: S3Server):
    """Make the first requests for keys with an ending fail."""

    def set_faults(fault: Fault, ending: str, times: int = 10**9) -> None:
        counter = itertools.count()

        def fault_of(request: Request) -> Fault | None:
            hit = request.method == "GET" and request.path.partition("?")[0].endswith(ending)
            return fault if hit and next(counter) < times else None

        s3.fault_of = fault_of

    return set_faults
