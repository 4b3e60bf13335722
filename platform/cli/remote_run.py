"""`headrace train --resume URL`: the run folder is fetched, and the run continues in a local one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.platform.config.load import CONFIG_FILE
from headrace.platform.tracking.run_owner import OWNER_FILE, own_run_folder
from headrace.storage.core.durable import replace_durably
from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import read_regular
from headrace.storage.remote.cache import cache_errors
from headrace.storage.remote.folder import is_remote, open_remote

ORIGIN_FILE = "fetched_from.json"
_RUN_DIR = "run.dir="


def local_run(resume: str | None, words: Sequence[str], runs_dir: Path = Path("runs")) -> str | None:
    """What --resume names, as a local run folder: a URL's newest whole checkpoint and configuration are fetched.

    The folder is run.dir=DIR of the words, else `runs_dir`/NAME, NAME the last part of the URL. Its config.yaml comes
    last: until then no verb takes it as a run folder, and the same command continues the fetch. A folder that was
    fetched from there before is continued as it is.

    Args:
        resume: as given; None and paths come back unchanged.

    Raises:
        InputError: no run with a checkpoint at the URL, or a local folder that is something else. MachineError: the
            store cannot be reached, or no room here.
    """
    if resume is None or not is_remote(resume):
        return resume
    remote = open_remote(resume)
    given = [word.removeprefix(_RUN_DIR) for word in words if word.startswith(_RUN_DIR)]
    run_dir = Path(given[-1]).expanduser() if given else runs_dir / remote.name
    origin = json.dumps({"url": remote.url}) + "\n"
    if _holds_something_else(run_dir, origin):
        raise InputError(
            f"--resume {resume}: {run_dir} is there and was not fetched from that URL; give another folder with "
            f"run.dir=DIR, or continue it: --resume {run_dir}"
        )
    if (run_dir / CONFIG_FILE).is_file():
        print(
            f"headrace train: {run_dir} was fetched from {remote.url} before; the run continues in it", file=sys.stderr
        )
        return str(run_dir)
    config = remote.read(CONFIG_FILE)
    with own_run_folder(run_dir), cache_errors(run_dir):
        replace_durably(run_dir / ORIGIN_FILE, origin.encode())
        _fetch(remote.url, run_dir)
        replace_durably(run_dir / CONFIG_FILE, config)
    return str(run_dir)


def _fetch(url: str, run_dir: Path) -> None:
    from headrace.workers.train.remote_checkpoint import fetch_checkpoint

    manifest, damages = fetch_checkpoint(url, run_dir)
    for damage in damages:
        print(f"headrace train: warning: a newer checkpoint is skipped: {damage}", file=sys.stderr)
    print(f"headrace train: step {manifest.step} of {url} is in {run_dir}", file=sys.stderr)


def _holds_something_else(run_dir: Path, origin: str) -> bool:
    if not run_dir.exists() or (run_dir.is_dir() and set(os.listdir(run_dir)) <= {OWNER_FILE}):
        return False
    note = run_dir / ORIGIN_FILE
    return not note.is_file() or read_regular(note).decode(errors="replace") != origin
