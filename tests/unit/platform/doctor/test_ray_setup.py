"""Ray's token and ports: what is read from files, environment and sockets, and what is said about it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.platform.doctor import ray_setup
from headrace.platform.doctor.check import Status
from headrace.platform.doctor.ray_setup import PortsReading, TokenReading, check_ray_ports, check_ray_token


@pytest.mark.parametrize(
    ("token", "status", "found"),
    [
        (TokenReading(None, "~/.ray/auth_token"), Status.passed, "~/.ray/auth_token"),
        (TokenReading(None, None), Status.passed, "none yet"),
        (TokenReading("token", None), Status.passed, "none yet"),
        (TokenReading("disabled", None), Status.warn, "RAY_AUTH_MODE=disabled"),
        (TokenReading(None, "f", readable_by_others=True), Status.warn, "readable by every user"),
        (TokenReading(None, None, joins=True), Status.warn, "RAY_ADDRESS names a cluster"),
        (TokenReading("token", None, joins=True), Status.fail, "RAY_ADDRESS names a cluster"),
        (TokenReading(None, None, broken="/t is empty"), Status.fail, "/t is empty"),
        (TokenReading(None, None, can_make=False), Status.fail, "cannot be written"),
    ],
)
def test_token(token: TokenReading, status: Status, found: str) -> None:
    check = check_ray_token(token)
    assert check.status is status
    assert found in check.found


NONE = PortsReading(None, False, None, False)


@pytest.mark.parametrize(
    ("ports", "status", "found"),
    [
        (NONE, Status.passed, "6379, 8265, 10001 are free"),
        (replace(NONE, taken=(8265,)), Status.warn, "8265 (dashboard)"),
        (replace(NONE, head="127.0.0.1:6379", head_answers=True, taken=(6379,)), Status.passed, "a local cluster runs"),
        (
            replace(NONE, head="127.0.0.1:6379", note="/n"),
            Status.warn,
            "the noted cluster address is out of date: a cluster at 127.0.0.1:6379",
        ),
        (replace(NONE, address="head:6379"), Status.fail, "nothing answers at RAY_ADDRESS head:6379"),
        (replace(NONE, address="head:6379", answers=True), Status.passed, "a cluster answers"),
    ],
)
def test_ports(ports: PortsReading, status: Status, found: str) -> None:
    check = check_ray_ports(ports)
    assert check.status is status
    assert found in check.found


def test_the_token_is_looked_for_where_ray_looks(tmp_path: Path) -> None:
    home, usual = tmp_path / "home", tmp_path / "home/.ray/auth_token"
    usual.parent.mkdir(parents=True)
    assert ray_setup.read_token({}, home).source is None
    usual.write_text("secret\n")
    assert ray_setup.read_token({}, home).source == str(usual)
    assert ray_setup.read_token({"RAY_AUTH_MODE": "Disabled"}, home).mode == "disabled"
    assert ray_setup.read_token({"RAY_ADDRESS": "head:6379"}, home).joins
    assert not ray_setup.read_token({"RAY_ADDRESS": "auto"}, home).joins
    other = tmp_path / "other"
    assert ray_setup.read_token({"RAY_AUTH_TOKEN_PATH": str(other)}, home).broken == f"{other} does not exist"
    other.write_text(" \n")
    assert ray_setup.read_token({"RAY_AUTH_TOKEN_PATH": str(other)}, home).broken == f"{other} is empty"
    other.write_text("secret")
    assert ray_setup.read_token({"RAY_AUTH_TOKEN_PATH": str(other)}, home).source == str(other)
    named = ray_setup.read_token({"RAY_AUTH_TOKEN_PATH": str(other), "RAY_AUTH_TOKEN": "s"}, home)
    assert named.source is not None
    assert "RAY_AUTH_TOKEN" in named.source


def test_who_can_read_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "folder" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    opened = [tmp_path, *tmp_path.parents]
    original = Path.stat
    # The folders above a test's own are its user's alone: pretend that they are open.
    monkeypatch.setattr(
        Path, "stat", lambda path, **kw: os.stat_result((0o40755, *[0] * 9)) if path in opened else original(path, **kw)
    )
    for file_mode, folder_mode, readable in ((0o644, 0o755, True), (0o600, 0o755, False), (0o644, 0o700, False)):
        file.chmod(file_mode)
        file.parent.chmod(folder_mode)
        assert ray_setup._others_can_read(file) is readable


@pytest.mark.parametrize(
    ("address", "cluster"),
    [
        ("", None),
        ("auto", None),
        ("local", None),
        ("head:6379", ("head", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("ray://head", ("head", 10001)),
        ("http://head", ("head", 8265)),
        ("[::1]:6379", ("::1", 6379)),
        ("head:many", ("", 0)),
    ],
)
def test_addresses(address: str, cluster: tuple[str, int] | None) -> None:
    assert ray_setup.cluster_of({"RAY_ADDRESS": address}) == cluster


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_ports_are_knocked_at(listening: int, silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_setup, "find_head", lambda: None)
    ports = {listening: "head", silent: "dashboard"}
    nowhere = {"RAY_TMPDIR": str(tmp_path)}
    assert ray_setup.read_ports(nowhere, ports=ports) == replace(NONE, taken=(listening,))
    reading = ray_setup.read_ports({**nowhere, "RAY_ADDRESS": f"127.0.0.1:{listening}"}, ports={})
    assert reading == replace(NONE, address=f"127.0.0.1:{listening}", answers=True)
    assert not ray_setup.read_ports({**nowhere, "RAY_ADDRESS": f"127.0.0.1:{silent}"}, ports={}).answers
    assert not ray_setup.read_ports({**nowhere, "RAY_ADDRESS": "127.0.0.1:many"}, ports={}).answers
    (tmp_path / "ray").mkdir()
    for port, answers in ((listening, True), (silent, False)):
        (tmp_path / "ray/ray_current_cluster").write_text(f"127.0.0.1:{port}")
        reading = ray_setup.read_ports(nowhere, ports={})
        assert (reading.head, reading.head_answers) == (f"127.0.0.1:{port}", answers)
        assert reading.note == str(tmp_path / "ray/ray_current_cluster")


def test_ray_is_not_imported() -> None:
    look = "str([m for m in ('ray', 'torch') if m in sys.modules])"
    code = f"import sys, headrace.platform.doctor.diagnosis; sys.exit({look})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
