"""A port of this machine that is free."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from headrace.storage.core.errors import MachineError

GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, LAST = 20_000, 65_535  # Ray's workers have 10002 to 19999
_claims: list[socket.socket] = []


def free_port() -> int:
    """A TCP port that is free now, on every address of this machine, and likely still is when it is used.

    While this process lives, no other one gets it here: it binds a name that the kernel frees with the process.

    It is not one of those that the kernel hands to whoever asks for any port or connects to another process: on a busy
    machine these are taken again within a second.
    """
    given = range(0)
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, GIVEN.read_text().split())
        given = range(first, last + 1)
    others = [port for port in range(FIRST, LAST + 1) if port not in given]
    # By the system's own generator: two processes with the same seed would draw the same port.
    for port in [*random.SystemRandom().sample(others, min(100, len(others))), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found = int(probe.getsockname()[1])
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0headrace port {found}")
            except OSError:
                claim.close()
                continue
            _claims.append(claim)
            return found
    raise MachineError("no TCP port of this machine is free")
