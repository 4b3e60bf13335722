"""Looks at a Ray cluster, or at this machine, before Ray does: it takes minutes where this takes seconds. No Ray."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from headrace.platform.control.auth_token import read_token, token_place
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.head import find_head
from headrace.platform.control.placement import NodeResources, place
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.workers.actors.net import own_address, port_answers
from headrace.workers.train.config import DeviceKind

LOCAL = "local"
ANSWER_S = 2.0
# What a Unix socket's path may have, and what Ray puts behind its folder: session_DATE_TIME_MICROSECONDS_PID.
SOCKET_PATH_BYTES = 107
SESSION = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
# Any call that Ray's head answers without side effects; it checks the token first.
ASK = "/ray.rpc.NodeInfoGcsService/GetClusterId"
ASK_NODE = "/ray.rpc.NodeManagerService/GetSystemConfig"


def address_of(cluster: ClusterConfig) -> str:
    """Which cluster a run uses, or "local" for one of its own; see ClusterConfig.address."""
    if cluster.address is not None:
        return cluster.address
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    head = find_head()
    return LOCAL if head is None else head.address


def check_cluster(cluster: ClusterConfig, device: DeviceKind) -> None:
    """Refuse what can never run, within seconds and before anything is started.

    Raises:
        InputError: the address is none. MachineError: nothing answers there, or refuses the token; this machine cannot
            hold the ranks, or has no place for Ray's files.
    """
    if cluster.launcher is not Launcher.ray:
        return
    address = address_of(cluster)
    if address != LOCAL:
        check_address(address, "RAY_ADDRESS" if cluster.address is None else "cluster.address")
        return
    check_temporary_folder()
    if cluster.num_nodes > 1:
        raise MachineError(
            f"cluster.num_nodes={cluster.num_nodes}: without an address the run has this machine alone. Set "
            "cluster.address or RAY_ADDRESS to the cluster's head, HOST:PORT",
            id=ErrorId.cluster_too_small,
        )
    if device is DeviceKind.cpu:
        cpus = float(os.cpu_count() or 1)
        place(cluster, [NodeResources("here", "127.0.0.1", cpus, 0.0, cpus, 0.0)], device)


def check_address(address: str, key: str) -> str:
    """HOST:PORT of a head that answers and takes this user's token.

    Args:
        address: HOST:PORT, or "auto" for the newest cluster of this machine.
        key: who said so, for the message.

    Raises:
        InputError: not an address. MachineError: nothing answers within seconds, or the token is refused.
    """
    where = _newest_here() if address == "auto" else address
    if not re.fullmatch(r"(\[[^\]]+\]|[^:/\s]+):\d{1,5}", where):
        raise InputError(f"{key}={address}: HOST:PORT of the cluster's head is expected, as 10.0.0.1:6379")
    remedy = "Start the cluster, correct the address, or leave it out to start Ray for this run"
    if not port_answers(where, ANSWER_S):
        raise MachineError(f"{key}={address}: nothing answers there. {remedy}", id=ErrorId.cluster_unreachable)
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        _ask(where, ASK, f"{key}={address}", remedy)
    return where


def check_node(address: str, port: int) -> None:
    """Refuse a node of the cluster that does not answer here, or has another token than the head.

    Raises:
        MachineError: within seconds; names the node.
    """
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    said, remedy = (
        f"node {address}",
        "Its link is cut, its Ray has ended, or a firewall closes its ports to this machine",
    )
    if not port_answers(where, ANSWER_S):
        raise MachineError(f"{said}: nothing answers at port {port}. {remedy}", id=ErrorId.cluster_unreachable)
    if os.environ.get("RAY_USE_TLS", "0") != "1":
        _ask(where, ASK_NODE, said, remedy)


def listens_on_loopback_only(address: str) -> bool:
    """Whether a head is reached as 127.0.0.1 and not by this machine's own address: as those that we start."""
    host, _, port = address.rpartition(":")
    return host in ("127.0.0.1", "localhost") and not port_answers(f"{own_address()}:{port}", ANSWER_S)


def check_temporary_folder(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> None:
    """Refuse a folder for Ray's sockets that is too deep, or cannot be written.

    Raises:
        MachineError: names the variable, the folder and the remedy.
    """
    key = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environ), None)
    folder = Path(environ[key] if key is not None else "/tmp")
    session = SESSION.format(pid=os.getpid() if pid is None else pid)
    most = SOCKET_PATH_BYTES - len(session) - 1
    said = f"{key or 'the temporary folder'}={folder}"
    if len(os.fsencode(folder)) > most:
        raise MachineError(
            f"{said}: {len(os.fsencode(folder))} bytes are too long for Ray's sockets, which take {most}; set "
            "RAY_TMPDIR=/tmp, or another short folder"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=folder / "ray"))
    except OSError as error:
        raise MachineError(
            f"{said}: Ray cannot write there: {error.strerror}. Set RAY_TMPDIR to a short folder where it can"
        ) from error


def _newest_here() -> str:
    environ = os.environ
    base = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(base) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        raise MachineError(
            "RAY_ADDRESS=auto: no cluster was started on this machine; leave it out to start Ray for this run",
            id=ErrorId.cluster_unreachable,
        ) from None


def _ask(where: str, method: str, said: str, remedy: str) -> None:
    """One small call to a Ray. Ray itself would try a refused token for 20 s, and a silent port for ever."""
    import grpc

    place = token_place()
    token = read_token(place)
    try:
        with grpc.insecure_channel(where) as channel:
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            channel.unary_unary(method)(b"", timeout=ANSWER_S, metadata=metadata, wait_for_ready=True)
    except grpc.RpcError as error:
        code = error.code()
    else:
        return
    if code is grpc.StatusCode.UNAUTHENTICATED:
        have = "was not accepted" if token else "is not there"
        raise MachineError(
            f"{said}: the Ray cluster needs its token, and {place.words} {have}. Copy the token of the cluster's head "
            "(`ray get-auth-token` there) to that place, or set RAY_AUTH_TOKEN; all nodes need the same one",
            id=ErrorId.token_refused,
        )
    # UNIMPLEMENTED: another server, such as a proxy, or a port of Ray that is not its head's.
    if code.name in ("DEADLINE_EXCEEDED", "UNAVAILABLE", "UNIMPLEMENTED"):
        raise MachineError(f"{said}: the port is open and no Ray answers. {remedy}", id=ErrorId.cluster_unreachable)
