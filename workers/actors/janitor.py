"""Removes the slabs of an owner that was killed. A terabyte of shared memory must not wait for the next run to start.

A small process of its own session: what kills its owner by name or by group does not reach it. No Ray, no torch.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from headrace.storage.core.owners import Owner, this_process
from headrace.storage.tiers.sweep import sweep_folder, sweep_notes


def watch_this_process(folder: Path) -> subprocess.Popen[bytes]:
    """Start a janitor for the calling process's slabs in `folder`; kill it when they are gone in order."""
    owner = this_process()
    words = [sys.executable, "-m", "headrace.workers.actors.janitor", str(owner.pid), str(owner.start_ticks)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        [*words, str(folder)], stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
    )


def wait_and_sweep(owner: Owner, folder: Path) -> list[Path]:
    """Sleep until the owner has ended, then sweep; returns what was removed."""
    try:
        watched = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return [*sweep_folder(folder), *sweep_notes()]
    try:
        if owner.is_alive():  # else the id is another process's by now
            select.select([watched], [], [])
    finally:
        os.close(watched)
    return [*sweep_folder(folder), *sweep_notes()]


def main(argv: list[str]) -> None:
    """PID, start ticks, folder."""
    here = this_process()
    wait_and_sweep(Owner(here.host, here.boot_id, int(argv[0]), int(argv[1])), Path(argv[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
