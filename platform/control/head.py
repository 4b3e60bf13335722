"""A Ray head that stays on this machine, so that runs share one dashboard. Ray is started by its own command. No Ray.

Its address is kept in the user's cache folder, where a run without another address reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from headrace.platform.control.auth_token import ensure_token
from headrace.platform.control.ray_env import LOOPBACK, OBJECT_STORE_BYTES, ray_environment
from headrace.platform.monitor.files import RAY_BOARDS_FOLDER
from headrace.storage.core.errors import MachineError
from headrace.storage.core.outside import parse_json, read_regular
from headrace.storage.core.owners import Owner, owner_of, start_ticks
from headrace.storage.core.ports import free_port
from headrace.storage.remote.cache import cache_home
from headrace.workers.actors.net import port_answers

START_TIMEOUT_S, STOP_TIMEOUT_S = 300.0, 30.0  # one that ends meanwhile is seen at once
DASHBOARD_PORT = 8265
# Ray's dashboard looks for them there: `headrace monitor` starts them. Ray writes its own boards for Grafana.
PROMETHEUS_URL, GRAFANA_URL = "http://127.0.0.1:9090", "http://127.0.0.1:3000"
PROMETHEUS, GRAFANA, RAY_BOARDS = "RAY_PROMETHEUS_HOST", "RAY_GRAFANA_HOST", "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"


@dataclass(frozen=True)
class Head:
    """A head that was started here; its dashboard looks for Prometheus and Grafana at the last two addresses."""

    address: str
    dashboard_url: str
    log: str
    process: Owner
    prometheus_url: str = PROMETHEUS_URL
    grafana_url: str = GRAFANA_URL

    def is_alive(self) -> bool:
        """Whether its process runs and takes connections."""
        return self.process.host == socket.gethostname() and self.process.is_alive() and port_answers(self.address, 2.0)


def head_file() -> Path:
    """Where the address is kept."""
    return cache_home() / "ray_head.json"


def monitor_folder() -> Path:
    """Where the files of Prometheus and Grafana are written."""
    return cache_home() / "monitor"


def find_head() -> Head | None:
    """The head of this machine and user, where one is up."""
    head = _read()
    return head if head is not None and head.is_alive() else None


def start_head(prometheus_url: str = PROMETHEUS_URL, grafana_url: str = GRAFANA_URL) -> Head:
    """The head that is up, or a new one that outlives this process.

    Args:
        prometheus_url / grafana_url: where a new one's dashboard looks for them, unless Ray's variables say it.

    Raises:
        MachineError: Ray did not start; ends with the last lines of its log.
    """
    head = find_head()
    if head is not None:
        return head
    stop_head()
    ensure_token()
    folder = head_file().parent
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise MachineError(
            f"{folder}: the head's address cannot be kept there: {error.strerror}. Set XDG_CACHE_HOME to a folder of "
            "yours"
        ) from error
    log = folder / "ray_head.log"
    port, dashboard_port = free_port(), _free_port_from(DASHBOARD_PORT)
    address = f"127.0.0.1:{port}"
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    words += ["--node-ip-address=127.0.0.1", f"--port={port}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    words += [f"--dashboard-port={dashboard_port}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    # Ports that have a fixed default would collide with another cluster of this machine.
    words += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
    metrics = {PROMETHEUS: prometheus_url, GRAFANA: grafana_url, RAY_BOARDS: str(monitor_folder() / RAY_BOARDS_FOLDER)}
    environment = metrics | ray_environment() | LOOPBACK
    with log.open("w") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    url = f"http://127.0.0.1:{dashboard_port}"
    head = Head(address, url, str(log), owner_of(process.pid), environment[PROMETHEUS], environment[GRAFANA])
    until_s = time.monotonic() + START_TIMEOUT_S
    board = f"127.0.0.1:{dashboard_port}"
    while not (port_answers(address, 2.0) and port_answers(board, 2.0) and "runtime started" in log.read_text()):
        if process.poll() is not None or time.monotonic() > until_s:
            _end(head)
            tail = "\n".join(_plain(log.read_text()).splitlines()[-15:])
            raise MachineError(f"the Ray head did not start; the end of {log}:\n{tail}")
        time.sleep(0.2)
    unfinished = head_file().with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(head)))
    unfinished.replace(head_file())
    return head


def stop_head() -> bool:
    """End the head, its workers and nothing else; False where none was up."""
    head = _read()
    if head is None:
        return False
    was_up = head.process.host == socket.gethostname() and head.process.is_alive()
    if was_up:
        _end(head)
    head_file().unlink(missing_ok=True)
    return was_up


def _end(head: Head) -> None:
    """Ask `ray start --block` to end its children, and see to it."""
    group = head.process.pid  # it leads a session of its own
    children = [owner_of(pid) for pid in _session(group)]
    with contextlib.suppress(ProcessLookupError):
        os.kill(group, signal.SIGTERM)
    until_s = time.monotonic() + STOP_TIMEOUT_S
    # It is not waited for: a zombie counts as dead, and its exit status belongs to whoever started it.
    while any(child.is_alive() for child in children) and time.monotonic() < until_s:
        time.sleep(0.1)
    for child in children:
        if child.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """Processes of the leader's session that run."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(pid) == leader and start_ticks(pid) is not None:
                found.append(pid)
    return found


def _read() -> Head | None:
    try:
        fields = parse_json(read_regular(head_file()))
        return Head(**{**fields, "process": Owner(**fields["process"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _free_port_from(first: int) -> int:
    for port in range(first, first + 50):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    return free_port()


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
