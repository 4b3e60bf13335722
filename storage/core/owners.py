"""Processes that own tier files: how one is named, and how one is known to be dead. No torch.

A process id alone is reused; with its start time (clock ticks since boot, field 22 of /proc/PID/stat) and the boot it
is not. A process that has ended but was not waited for counts as dead once none of its threads runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """One process of one boot of one host."""

    host: str
    boot_id: str
    pid: int
    start_ticks: int

    @property
    def tag(self) -> str:
        """Short form for file names: PID-START."""
        return f"{self.pid}-{self.start_ticks}"

    def is_alive(self) -> bool:
        """Whether the process still runs. Asked on its own host."""
        return self.boot_id == _boot_id() and start_ticks(self.pid) == self.start_ticks


PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
# Loaded here: nothing may be imported between fork and exec.
LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have the kernel kill the calling process when the thread that started it ends, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def this_process() -> Owner:
    """The calling process."""
    return owner_of(os.getpid())


def owner_of(pid: int) -> Owner:
    """A process of this host by id. Raises ProcessLookupError where it does not run."""
    ticks = start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(f"process {pid} does not run")
    return Owner(socket.gethostname(), _boot_id(), pid, ticks)


def start_ticks(pid: int) -> int | None:
    """Start time of a running process in clock ticks since boot; None where it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        # The second field is the command in parentheses and may hold spaces and parentheses of its own.
        fields = stat.rsplit(")", 1)[1].split()
        # A killed process whose leader is a zombie may have a thread that still sits in a write.
        if fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) <= 1:
            return None
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
