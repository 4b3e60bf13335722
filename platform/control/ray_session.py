"""Connects to a Ray cluster for one run, or starts one, and leaves it as it was found."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.platform.control.auth_token import TokenPlace, ensure_token, use_token_if_there
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.head import find_head
from headrace.platform.control.ray_env import object_store_bytes, plasma_directory, set_ray_environment
from headrace.storage.core.errors import MachineError

LOCAL = "local"


@dataclass(frozen=True)
class RaySession:
    """The cluster that a run uses. `started` says whether it ends with the run."""

    address: str
    dashboard_url: str | None
    started: bool


def address_of(cluster: ClusterConfig) -> str:
    """Which cluster a run uses, or "local" for one of its own; see ClusterConfig.address."""
    if cluster.address is not None:
        return cluster.address
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    head = find_head()
    return LOCAL if head is None else head.address


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[RaySession]:
    """A connection for as long as the block runs. A process that is connected already stays so.

    Raises:
        MachineError: no cluster at the address, a wrong or missing token, a Ray of another version.
    """
    address = address_of(cluster)
    set_ray_environment()
    place = ensure_token() if address == LOCAL else use_token_if_there()
    import ray  # after the environment is set: Ray reads it once

    if ray.is_initialized():
        yield RaySession(ray.get_runtime_context().gcs_address, None, False)
        return
    try:
        context = _start(cluster) if address == LOCAL else _join(address, place)
        yield context
    finally:
        ray.shutdown()


def _start(cluster: ClusterConfig) -> RaySession:
    import ray

    context = ray.init(
        address=LOCAL,
        include_dashboard=cluster.dashboard,
        object_store_memory=object_store_bytes(),
        log_to_driver=False,
        logging_level=logging.ERROR,
        _plasma_directory=plasma_directory(),
    )
    return RaySession(ray.get_runtime_context().gcs_address, _url(context.dashboard_url), True)


def _join(address: str, place: TokenPlace) -> RaySession:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        have = "is there and was not accepted" if place.there else "is not there"
        raise MachineError(
            f"the Ray cluster at {address} wants its token, and {place.words} {have}. Copy the token of the cluster's "
            "head (`ray get-auth-token` there) to that place, or set RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"no Ray cluster can be joined at {address}: {error}. Check cluster.address and RAY_ADDRESS, or leave both "
            "out to start Ray for this run"
        ) from error
    return RaySession(ray.get_runtime_context().gcs_address, _url(context.dashboard_url), False)


def _url(found: str | None) -> str | None:
    if not found:
        return None
    return found if found.startswith("http") else f"http://{found}"
