"""Ports. No Ray, no torch."""

from __future__ import annotations

import socket

from headrace.storage.core.cleanup import after_error


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
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: only the route is looked up
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def loopback_listener(port: int) -> socket.socket:
    """A socket that listens on 127.0.0.1 only. Raises OSError where the port is taken."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(4096)
    except BaseException as error:
        after_error(error, listener.close)
        raise
    return listener
