"""Removes the slabs of an owner that was killed. A terabyte of shared memory must not wait for the next run to start.

A small process of its own session: what kills its owner by name or by group does not reach it. No Ray, no torch.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.storage.core.owners import Owner, this_process
from headrace.storage.tiers.sweep import sweep_folder, sweep_notes


def watch_this_process(folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start a janitor for the calling process's slabs in `folders`; kill it when they are gone in order.

    It also removes what notes tell of, wherever that is (see sweep.py).
    """
    owner = this_process()
    words = [sys.executable, "-m", "headrace.workers.actors.janitor", str(owner.pid), str(owner.start_ticks)]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(
        [*words, *map(str, folders)], stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
    )


def wait_and_sweep(owner: Owner, folders: Sequence[Path]) -> list[Path]:
    """Sleep until the owner has ended, then sweep; returns what was removed."""
    try:
        watched = os.pidfd_open(owner.pid)
    except ProcessLookupError:
        return _sweep(folders)
    try:
        if owner.is_alive():  # else the id is another process's by now
            select.select([watched], [], [])
    finally:
        os.close(watched)
    return _sweep(folders)


def _sweep(folders: Sequence[Path]) -> list[Path]:
    return [*(path for folder in folders for path in sweep_folder(folder)), *sweep_notes()]


def main(argv: list[str]) -> None:
    """PID, start ticks, folders."""
    here = this_process()
    wait_and_sweep(Owner(here.host, here.boot_id, int(argv[0]), int(argv[1])), [Path(word) for word in argv[2:]])


if __name__ == "__main__":
    main(sys.argv[1:])
