"""Connects to a Ray cluster for one run, or starts one, and leaves it as it was found."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.platform.control import guard
from headrace.platform.control.auth_token import ensure_token, token_is_off, use_token_if_there
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.ray_env import (
    OBJECT_STORE_BYTES,
    plasma_directory,
    set_ray_environment,
    use_loopback_only,
)
from headrace.platform.control.reach import (
    LOCAL,
    address_of,
    check_address,
    check_temporary_folder,
    listens_on_loopback_only,
)
from headrace.storage.core.cleanup import CleanUps
from headrace.storage.core.errors import ErrorId, MachineError

if TYPE_CHECKING:
    from ray.job_config import JobConfig

BUSY_START_S = 180.0  # for Ray to come up where other work takes the cores; Ray itself gives up after 30 s


@dataclass(frozen=True)
class RaySession:
    """The cluster that a run uses.

    Args:
        started: whether it ends with the run.
        token: where its token is, in words; None where it has none.
    """

    address: str
    dashboard_url: str | None
    started: bool
    token: str | None


@contextmanager
def ray_session(cluster: ClusterConfig, run: str | None = None) -> Iterator[RaySession]:
    """A connection for as long as the block runs. A process that is connected already stays so.

    Args:
        run: name of the job on Ray's dashboard.

    Raises:
        InputError: not an address. MachineError: no cluster there, a wrong or missing token, a Ray of another version,
            no place for the files of one that is started.
    """
    address = address_of(cluster)
    set_ray_environment()
    place = ensure_token(keep=False) if address == LOCAL else use_token_if_there()
    token = None if token_is_off() or not place.there else place.words
    import ray  # after the environment is set: Ray reads it once
    from ray.job_config import JobConfig

    if ray.is_initialized():
        yield RaySession(ray.get_runtime_context().gcs_address, None, False, token)
        return
    with CleanUps() as closing:
        if address == LOCAL:
            closing.enter_context(_guarded())
        closing.callback(ray.shutdown)
        job = JobConfig(metadata={} if run is None else {"job_name": run})
        yield _start(cluster, token, job) if address == LOCAL else _join(address, token, job)


@contextmanager
def _guarded() -> Iterator[None]:
    """What the raylet that is started meanwhile has started ends with the block, also where this process is killed."""
    # In a session of its own: a Ctrl-C in the terminal is not for it. Closing the pipe ends it.
    words = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid())]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True):
        yield


@contextmanager
def patience() -> Iterator[None]:
    """On a busy machine, a node that Ray starts meanwhile has BUSY_START_S to register, and not Ray's own 30 s.

    Ray asks for the node again and again, and looks at its clock only after an answer.
    """
    services = importlib.import_module("ray._private.services")
    ask, until_s = services.get_node, time.monotonic() + BUSY_START_S

    def patient(*words: Any) -> Any:
        while True:
            try:
                return ask(*words)
            except RuntimeError:
                if time.monotonic() > until_s or os.getloadavg()[0] < (os.cpu_count() or 1):
                    raise
                time.sleep(0.2)

    services.get_node = patient  # type: ignore[attr-defined]
    try:
        yield
    finally:
        services.get_node = ask  # type: ignore[attr-defined]


def _start(cluster: ClusterConfig, token: str | None, job: JobConfig) -> RaySession:
    import ray

    check_temporary_folder()
    use_loopback_only()
    # The processes that Ray starts inherit the mask: a terminal that closes must not end them before the ranks have
    # saved. Here the signal waits until Ray is up.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        with patience():
            context = ray.init(
                address=LOCAL,
                job_config=job,
                include_dashboard=cluster.dashboard,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _plasma_directory=plasma_directory(),
            )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    return RaySession(ray.get_runtime_context().gcs_address, _url(context.dashboard_url), True, token)


def _join(address: str, token: str | None, job: JobConfig) -> RaySession:
    import ray

    address = check_address(address, "cluster.address, RAY_ADDRESS or the head of `headrace dashboard`")
    if listens_on_loopback_only(address):
        use_loopback_only()
    try:
        context = ray.init(address=address, job_config=job, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"no Ray cluster can be joined at {address}: {error}. Check cluster.address and RAY_ADDRESS, or leave both "
            "out to start Ray for this run",
            id=ErrorId.cluster_unreachable,
        ) from error
    return RaySession(ray.get_runtime_context().gcs_address, _url(context.dashboard_url), False, token)


def _url(found: str | None) -> str | None:
    if not found:
        return None
    return found if found.startswith("http") else f"http://{found}"
