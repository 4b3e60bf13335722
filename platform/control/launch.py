"""Runs a job: opens the cluster, calls the controller, closes everything again. Imports Ray only for Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.controller import Controller
from headrace.platform.control.group import Backend
from headrace.platform.control.signals import StopSignals
from headrace.platform.control.starting import Slabs
from headrace.platform.control.states import Recorder, RunOutcome
from headrace.platform.planning.steer import Steering
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import InputError
from headrace.workers.job import TrainJob
from headrace.workers.telemetry.records import RankEvent


def launch(
    job: TrainJob,
    cluster: ClusterConfig,
    recorder: Recorder,
    *,
    host_bytes: int,
    ssd_bytes: int,
    ssd_folders: Sequence[Path | str] = (),
    steering: Steering | None = None,
) -> RunOutcome:
    """Train until the job is finished, stopped by a signal, or has failed for good.

    SIGINT and SIGTERM stop all ranks after a checkpoint; a second one raises KeyboardInterrupt, and nothing is saved.

    Args:
        recorder: gets every report and event, from this thread.
        host_bytes / ssd_bytes: slabs per node, shared evenly by its ranks; 0 makes none.
        ssd_folders: of the slab files, one per drive, on every node; none only where ssd_bytes is 0.
        steering: see Controller.

    Raises:
        InputError: bad input, met here or by a rank. MachineError: the machine or the cluster cannot.
    """
    cluster.check()
    if ssd_bytes and not ssd_folders:
        raise InputError(f"{ssd_bytes} bytes of SSD are needed and there is no folder for them: set tiers.ssd.path")
    tiers = job.tiers
    folders = tuple(map(str, ssd_folders))
    slabs = Slabs(host_bytes, ssd_bytes, folders, tiers.ssd.direct, tiers.host.memory_grows)
    with CleanUps() as closing:
        stop = closing.enter_context(StopSignals())
        if cluster.launcher is Launcher.ray:
            recorder.on_stage("Ray")
            backend, recorder = _on_ray(job, cluster, recorder, slabs, closing, stop)
        else:
            from headrace.platform.control.inline import InlineBackend

            recorder.on_stage("processes")
            backend = InlineBackend(cluster, job.train.device, slabs, run=Path(job.run_dir).name)
        closing.callback(backend.close)
        recorder.on_event(RankEvent("cluster_ready", place(backend.facts), dict(backend.facts)))
        return Controller(backend, cluster, recorder, stop_requested=stop.requested, steering=steering).run(job)


def place(facts: Mapping[str, Any]) -> str:
    """Where the ranks will run, in a sentence for people."""
    ranks = f"{facts['num_ranks']} rank(s) on {facts.get('device') or 'this machine'}"
    if facts.get("launcher") != Launcher.ray.value:
        return f"{ranks}, in plain processes"
    whose = "started for this run" if facts.get("ray_started_by_run") else "joined"
    board = f"; dashboard {facts['dashboard_url']}" if facts.get("dashboard_url") else ""
    if board and facts.get("ray_token"):
        board += f" (enter the token once: {facts['ray_token']})"
    return f"{ranks}, {len(facts.get('nodes') or ())} node(s); Ray at {facts.get('address')}, {whose}{board}"


def _on_ray(
    job: TrainJob, cluster: ClusterConfig, recorder: Recorder, slabs: Slabs, closing: CleanUps, stop: StopSignals
) -> tuple[Backend, Recorder]:
    """The backend, and the recorder that also counts events in Ray's metrics."""
    from headrace.platform.control.ray_session import ray_session

    run = Path(job.run_dir).name
    session = closing.enter_context(ray_session(cluster, run))
    stop.take_over()  # Ray puts its own handler on SIGTERM
    from headrace.platform.control.event_counter import EventCounter
    from headrace.platform.control.ray_backend import RayBackend

    backend = RayBackend(cluster, job.train.device, slabs, run=run)
    backend.facts |= {
        "address": session.address,
        "dashboard_url": session.dashboard_url,
        "ray_started_by_run": session.started,
        "ray_token": session.token,
    }
    return backend, EventCounter(recorder, run)
