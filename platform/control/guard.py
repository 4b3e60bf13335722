"""Ends what a killed driver leaves of the Ray that it started: a script, run as `python -I -S guard.py DRIVER_PID`.

Ray ends its servers with the driver. Two agents, children of its raylet, then try to report to the ended head for a
minute. The guard reads standard input, which ends with the driver, however the driver ends; then it kills them. They
are found by the raylet's log, which they have inherited: its folder is named after the driver's process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time

LIMIT_S = 10.0


def children_of_raylet(driver_pid: int) -> list[int]:
    """Processes that may write to the log of the raylet that a driver has started. Who only reads it does not count."""
    log = re.compile(rf".*/session_[^/]*_{driver_pid}/logs/raylet\.(out|err)")
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{name}/fd"):
                if log.fullmatch(os.readlink(f"/proc/{name}/fd/{fd}")) and may_write(name, fd):
                    found.append(int(name))
                    break
        except OSError:  # it has ended, or is another user's
            continue
    return found


def may_write(pid: str, fd: str) -> bool:
    """Whether the descriptor of a process is open for writing."""
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        flags = next(line.split()[1] for line in file if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def main() -> None:
    """Wait for the end of the driver, then kill until nothing is left or the time is over."""
    sys.stdin.buffer.read()
    until_s = time.monotonic() + LIMIT_S
    while (left := children_of_raylet(int(sys.argv[1]))) and time.monotonic() < until_s:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


if __name__ == "__main__":
    main()
