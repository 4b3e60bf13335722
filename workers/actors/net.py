"""Ports, addresses and interfaces of this machine. No Ray, no torch."""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from headrace.storage.core.cleanup import after_error
from headrace.storage.core.errors import InputError, MachineError

# What gloo and NCCL read. NCCL takes any interface whose name begins so, unless an equals sign stands before it.
INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}


def port_answers(address: str, timeout_s: float) -> bool:
    """Whether a process accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except (OSError, OverflowError):
        return False


def own_address() -> str:
    """The address by which other machines reach this one; 127.0.0.1 where there is no network. Sends nothing."""
    try:
        return _address_towards("192.0.2.1")  # a documentation address
    except OSError:
        return "127.0.0.1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host, which is a name or an address: `localhost`, 127.0.0.2, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def use_interface(master: str, wanted: str | None = None) -> dict[str, str]:
    """Tell gloo and NCCL, in this process's environment, by which interface the other ranks are reached.

    Left alone, gloo takes the address of the host's name, which often is 127.0.0.1, and NCCL the first interface.

    Args:
        master: host of the rendezvous.
        wanted: `cluster.interface`. None leaves a variable that is set; the others get the interface that routes to
            `master`.

    Returns:
        The variables.

    Raises:
        InputError: there is no such interface here. MachineError: no route to `master`.
    """
    if wanted is not None and wanted not in (there := psutil.net_if_addrs()):
        raise InputError(
            f"cluster.interface={wanted}: {socket.gethostname()} has no such interface; choose one of "
            f"{', '.join(sorted(there))}, or leave it out to take the one that routes to rank 0's node"
        )
    if wanted is not None or any(name not in os.environ for name in INTERFACES):
        found = wanted or interface_towards(master)
        for name, mark in INTERFACES.items():
            if wanted is not None or name not in os.environ:
                os.environ[name] = mark + found
    return {name: os.environ[name] for name in INTERFACES}


def interface_towards(host: str) -> str:
    """The interface of this machine by which packets to the host leave. Raises MachineError: there is none."""
    try:
        own = _address_towards(host)
    except OSError as error:
        raise MachineError(
            f"{socket.gethostname()} has no route to {host}, where rank 0 is: {error}. Connect the nodes by one network"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == own for each in addresses):
            return name
    raise MachineError(
        f"{socket.gethostname()} reaches {host} from {own}, which is no interface's address; set cluster.interface"
    )


def _address_towards(host: str) -> str:
    """The address from which this machine reaches another one. Only the route is looked up: nothing is sent."""
    family, *_, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0]).partition("%")[0]


def loopback_listener(host: str, port: int) -> socket.socket:
    """A socket that listens on one loopback address only. Raises OSError where the port is taken."""
    family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(4096)
    except BaseException as error:
        after_error(error, listener.close)
        raise
    return listener
