"""One Ray cluster for the whole test session, and runs on it that are the same in plain processes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace.helpers.training import tiny_job
from headrace.platform.control import controller
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.launch import launch
from headrace.platform.control.ray_session import RaySession, ray_session
from headrace.platform.control.states import RunOutcome
from headrace.workers.job import TrainJob
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent, StepReport

# Slabs are named after their run: other test sessions of this machine have others.
RUNS = f"test{uuid.uuid4().hex[:8]}"
HOST_BYTES, SSD_BYTES = 1 << 20, 1 << 22
LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
LISTEN = "0A"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RaySession]:
    """A local cluster without a dashboard; what this process is connected to, `launch` uses."""
    os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # its least: alerts are waited for
    with ray_session(ClusterConfig(address="local", dashboard=False)) as session:
        yield session


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs and their data."""
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="session")
def job(folder: Path) -> Callable[..., TrainJob]:
    """tiny_job in a run folder of its own."""
    numbers = itertools.count()

    def make(**overrides: Any) -> TrainJob:
        return tiny_job(folder, run=f"{RUNS}_{next(numbers)}", **overrides)

    return make


@dataclass
class Run:
    """A recorder; `meddle` is called with every report and event."""

    meddle: Callable[[Run, Any], None] = lambda run, found: None
    reports: list[StepReport] = field(default_factory=list)
    events: list[RankEvent] = field(default_factory=list)
    outcome: RunOutcome | None = None

    def on_report(self, report: StepReport) -> None:
        self.reports.append(report)
        self.meddle(self, report)

    def on_event(self, event: RankEvent) -> None:
        self.events.append(event)
        self.meddle(self, event)

    def on_stage(self, text: str) -> None:
        pass

    def on_plan(self, record: Any) -> None:
        pass

    def on_part(self, text: str) -> None:
        pass

    @property
    def curve(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Loss and gradient norm by step and rank; a step that was done twice was the same twice."""
        found: dict[tuple[int, int], tuple[float, float]] = {}
        for report in self.reports:
            values = report.metrics[names.LOSS_TRAIN], report.metrics[names.GRAD_NORM]
            assert found.setdefault((report.step, report.rank), values) == values
        return found

    def of_kind(self, kind: str) -> list[RankEvent]:
        """Events of a kind."""
        return [event for event in self.events if event.kind == kind]

    def pid(self, rank: int) -> int:
        """Process of a rank of the newest group."""
        return self.of_kind("group_started")[-1].facts["ranks"][rank]["pid"]


@pytest.fixture
def start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run a job to its end by a launcher, with quick heartbeats: a tiny job would be over between two."""
    monkeypatch.setattr(controller, "POLL_S", 0.02)

    def run(
        job: TrainJob, launcher: str = "ray", *, meddle: Callable[[Run, Any], None] | None = None, **cluster: Any
    ) -> Run:
        recorder = Run() if meddle is None else Run(meddle)
        config = ClusterConfig(launcher=Launcher(launcher), dashboard=False, **cluster)
        recorder.outcome = launch(
            job, config, recorder, host_bytes=HOST_BYTES, ssd_bytes=SSD_BYTES, ssd_folders=[folder / "tiers"]
        )
        return recorder

    return run


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., AbstractContextManager[subprocess.Popen[str]]]:
    """A driver of two ranks in a process of its own, once it has printed a line that starts with `until`.

    Variables are added to its own.
    """

    @contextmanager
    def begin(job: TrainJob, launcher: str, *, until: str = "step", **env: str) -> Iterator[subprocess.Popen[str]]:
        (tmp_path / "job").write_bytes(pickle.dumps(job))
        cluster = json.dumps({"launcher": launcher, "num_workers": 2})
        words = [sys.executable, str(Path(__file__).with_name("driver.py")), str(tmp_path / "job"), cluster]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}) as driver:
            try:
                assert driver.stdout is not None
                assert any(line.startswith(until) for line in driver.stdout), f"it ended before {until}"
                yield driver
            finally:
                driver.kill()

    return begin


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    """No process holds a slab of this session, in memory or on disk, and no file lies in the tiers' folder."""
    yield
    until_s = time.monotonic() + 30
    while (held := Leftovers.slab_holders(RUNS, folder / "tiers")) and time.monotonic() < until_s:
        time.sleep(0.1)  # a killed process lets go of its files a moment after its death
    assert not held
    assert list((folder / "tiers").glob("*")) == []


class Leftovers:
    """What a driver of this machine leaves: processes, whoever their parent is by now, and slabs that they hold.

    Its processes are known by a variable that they inherit, and by the logs of the Ray that it has started, because
    agents write their titles over their variables. A cluster that was there before does not count.
    """

    NAME = "HEADRACE_TEST_MARK"

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def processes(self, driver_pid: int) -> dict[int, str]:
        """Those that run, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile, or is another user's
                inherited = f"{self.NAME}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                links = [os.readlink(link) for link in (folder / "fd").iterdir()]
                if inherited or any(re.search(rf"/session_[^/]*_{driver_pid}/", link) for link in links):
                    found[int(folder.name)] = Sockets.command(int(folder.name))
        return {pid: command for pid, command in found.items() if command}

    @staticmethod
    def slab_holders(run: str, tiers: Path) -> dict[int, set[str]]:
        """Processes that have slab files of a run open or mapped, with what the kernel calls the files."""
        held: dict[int, set[str]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                found = {line.split(maxsplit=5)[-1].rstrip() for line in (folder / "maps").read_text().splitlines()}
                for link in (folder / "fd").iterdir():
                    with suppress(OSError):
                        found.add(os.readlink(link))
                slabs = {path for path in found if path.startswith((f"/memfd:headrace-slab-{run}", f"{tiers}/"))}
                if slabs:
                    held[int(folder.name)] = slabs
        return held


@pytest.fixture
def leftovers() -> type[Leftovers]:
    """Finds what drivers leave."""
    return Leftovers


class Sockets:
    """Which processes of this machine listen where."""

    @staticmethod
    def descendants(root: int) -> list[int]:
        """A process and all below it."""
        children: dict[int, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except OSError:
                    continue
                children.setdefault(parent, []).append(int(folder.name))
        found, waiting = [], [root]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += children.get(pid, [])
        return found

    @staticmethod
    def listeners(pids: list[int]) -> list[tuple[int, str, int]]:
        """TCP sockets on which the processes listen: process, address as the kernel prints it, port."""
        owners: dict[str, int] = {}
        for pid in pids:
            try:
                links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            owners |= {link[len("socket:[") : -1]: pid for link in links if link.startswith("socket:[")}
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and fields[9] in owners:
                    address, port = fields[1].split(":")
                    found.append((owners[fields[9]], address, int(port, 16)))
        return found

    @staticmethod
    def command(pid: int) -> str:
        """The command line of a process."""
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""

    @classmethod
    def open_to_others(cls, pids: list[int]) -> list[tuple[int, str]]:
        """Ports that other machines reach, and whose they are."""
        return [(port, cls.command(pid)) for pid, address, port in cls.listeners(pids) if address not in LOOPBACK]


@pytest.fixture
def sockets() -> type[Sockets]:
    """The listening sockets of processes."""
    return Sockets
