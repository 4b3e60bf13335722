"""Drivers and owners of slabs that are killed with SIGKILL: nothing is left of them, and nobody cleans up."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from headrace.platform.control.states import Outcome
from headrace.workers.telemetry.records import StepReport

DEADLINE_S = 30.0


@pytest.fixture
def kill_driver(job, drive, leftovers, tmp_path: Path) -> Any:
    """Starts a driver, kills it, and returns the seconds until nothing of it is left."""

    def kill(launcher: str, after_s: float, *, until: str = "step") -> float:
        left, tiers = leftovers(), tmp_path / "tiers"
        running = job(train={"steps": 100_000}, memory="offload_ssd")
        run = Path(running.run_dir).name

        def found() -> list[Any]:
            """Processes, processes that hold its slabs, files."""
            shm = list(Path("/dev/shm").glob("*headrace*"))
            return [it for it in (left.processes(pids[0]), left.slab_holders(run, tiers), *tiers.glob("*"), *shm) if it]

        pids: list[int] = []
        with drive(running, launcher, until=until, **{left.NAME: left.mark, "RAY_ADDRESS": "local"}) as driver:
            pids.append(driver.pid)
            time.sleep(after_s)
            if launcher == "ray":
                assert sum("Agent" in command for command in left.processes(driver.pid).values()) == 2
            held = {path for paths in left.slab_holders(run, tiers).values() for path in paths}
            assert any(path.startswith("/memfd:") for path in held), "the slabs are there, or this shows nothing"
            assert any(path.startswith(f"{tiers}/") for path in held)
            driver.kill()
            driver.wait()
        begin_s = time.monotonic()
        while found() and time.monotonic() < begin_s + DEADLINE_S:
            time.sleep(0.1)
        assert found() == []
        return time.monotonic() - begin_s

    return kill


@pytest.mark.parametrize("launcher", ["inline", "ray"])
def test_a_killed_driver_leaves_nothing(launcher: str, kill_driver) -> None:
    kill_driver(launcher, random.Random().uniform(0.0, 0.5))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["inline", "ray"])
def test_20_killed_drivers_leave_nothing(launcher: str, kill_driver) -> None:
    """Half of them while their ranks start, half in their steps."""
    moments = random.Random(20)
    for index in range(20):
        until = "cluster_ready" if index % 2 else "step"
        gone_s = kill_driver(launcher, moments.uniform(0.0, 3.0), until=until)
        print(f"{launcher}, {until}: kill {index + 1} of 20, nothing left after {gone_s:.1f} s", flush=True)


@pytest.fixture
def kill_owners(job, start, ray_cluster, leftovers, folder: Path) -> Any:
    """A run of two ranks whose slab owners are killed in its first step."""

    def kill() -> None:
        killed: list[int] = []

        def meddle(run: Any, found: Any) -> None:
            if not killed and isinstance(found, StepReport):
                killed.extend(slab["pid"] for slab in run.of_kind("cluster_ready")[0].facts["slabs"])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        running = job(train={"steps": 8}, memory="offload_ssd")
        run = start(running, "ray", num_workers=2, meddle=meddle)
        assert run.outcome.outcome is Outcome.finished
        assert run.outcome.exit_code == run.outcome.restarts == 0
        lost = {event.facts["owner"]: event.facts["pid"] for event in run.of_kind("owner_lost")}
        assert lost == dict(zip(("host-memory", "ssd-storage"), killed, strict=True))
        until_s = time.monotonic() + DEADLINE_S
        while (
            held := leftovers.slab_holders(Path(running.run_dir).name, folder / "tiers")
        ) and time.monotonic() < until_s:
            time.sleep(0.1)
        assert not held

    return kill


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_20_killed_owners_leave_nothing(kill_owners) -> None:
    for _ in range(10):
        kill_owners()
