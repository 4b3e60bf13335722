"""Which head a run finds: one that is up, of this user, and no stale one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from headrace.platform.cli import dashboard
from headrace.platform.control import head as head_module
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.head import Head, find_head, head_file, stop_head
from headrace.platform.control.reach import address_of
from headrace.storage.core.errors import InputError
from headrace.storage.core.owners import owner_of, this_process


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def keep(head: Head) -> None:
    head_file().parent.mkdir(parents=True)
    head_file().write_text(json.dumps(asdict(head)))


def test_without_any_word_a_run_starts_its_own() -> None:
    assert find_head() is None
    assert address_of(ClusterConfig()) == "local"


def test_a_head_that_is_up_is_joined_unless_another_address_is_given(listening: str, monkeypatch) -> None:
    head = Head(listening, "http://127.0.0.1:1", "log", this_process())
    keep(head)
    assert find_head() == head
    assert address_of(ClusterConfig()) == listening
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(ClusterConfig()) == "10.0.0.1:6379"
    assert address_of(ClusterConfig(address="local")) == "local"


def test_a_head_that_has_died_or_does_not_answer_is_not_joined(listening: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = owner_of(child.pid)
    child.kill()
    child.wait()
    keep(Head(listening, "url", "log", gone))
    assert find_head() is None
    head_file().write_text(json.dumps(asdict(Head("127.0.0.1:1", "url", "log", this_process()))))
    assert find_head() is None
    head_file().write_text("{")
    assert find_head() is None


def test_stop_ends_the_heads_session_and_no_other(listening: str, monkeypatch) -> None:
    # Its child ignores the signal that ends the head, so it is killed after STOP_TIMEOUT_S.
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '600']); signal.signal(signal.SIGTERM, signal.SIG_DFL); "
        "print(child.pid, flush=True); input()"
    )
    monkeypatch.setattr(head_module, "STOP_TIMEOUT_S", 0.2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    head, other = (subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2))
    child, _ = (owner_of(int(started.stdout.readline())) for started in (head, other))
    keep(Head(listening, "url", "log", owner_of(head.pid)))
    assert stop_head()
    assert head.wait(600) == -signal.SIGTERM
    while child.is_alive():  # killed, and not yet gone
        time.sleep(0.01)
    assert other.poll() is None
    assert not head_file().exists()
    assert not stop_head()
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()


def test_the_verb_says_what_it_does_not_know_and_what_is_not_up(capsys) -> None:
    with pytest.raises(InputError, match="--stop"):
        dashboard.run(["--stopp"])
    assert dashboard.run(["--status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"up": False}
    assert dashboard.run(["--stop"]) == 0
