from __future__ import annotations

import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.storage.core import ports
from headrace.storage.core.ports import free_port


def test_it_can_be_listened_on_and_is_not_what_others_get() -> None:
    """The kernel gives ports of its range to every process that connects to another one."""
    first, last = map(int, ports.GIVEN.read_text().split())
    for _ in range(20):
        port = free_port()
        assert not first <= port <= last
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_processes_with_one_seed_get_different_ports() -> None:
    found = set()
    for _ in range(3):
        random.seed(1)
        found.add(free_port())
    assert len(found) > 1


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by another process either: tests that ran beside each other met on one port."""
    port = free_port()
    monkeypatch.setattr(ports, "FIRST", port)
    monkeypatch.setattr(ports, "LAST", port)
    again = "from headrace.storage.core import ports; ports.FIRST = ports.LAST = {}; print(ports.free_port())"
    done = subprocess.run([sys.executable, "-c", again.format(port)], capture_output=True, text=True, check=True)
    assert {int(done.stdout), free_port()}.isdisjoint({port})


@pytest.mark.parametrize("given", ["1024 65535", "20000 65535", "nonsense", None])
def test_other_ranges_of_the_kernel(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        (tmp_path / "range").write_text(given)
    monkeypatch.setattr(ports, "GIVEN", tmp_path / "range")
    assert 1024 <= free_port() <= 65535


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(ports, "FIRST", port)
        monkeypatch.setattr(ports, "LAST", port)
        assert free_port() != port
