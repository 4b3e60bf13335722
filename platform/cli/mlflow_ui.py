"""`headrace mlflow`: open the MLflow UI on the runs recorded here, or send it a run that it has missed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.platform.servers import end_on_kill
from headrace.storage.core.errors import InputError

USAGE = """\
usage: headrace mlflow [runs=DIR] [uri=URI] [--port=5000]
       headrace mlflow --send RUN

Opens the MLflow UI on the store of the runs in DIR (default: runs/) or on the SQL store URI. It listens on this machine
only. --send copies a run folder to MLflow and to the other trackers of its configuration, or what they do not have yet.
"""


def run(argv: Sequence[str]) -> int:
    """Run `headrace mlflow ...`.

    Raises:
        InputError: unknown words, no store, a port that is taken. HeadraceError: MLflow did not start, or took no run.
    """
    from headrace.platform.tracking.mlflow_file import sqlite_path
    from headrace.platform.tracking.mlflow_server import send_run, serve
    from headrace.platform.tracking.mlflow_store import default_store
    from headrace.platform.tracking.run_folder import find_run

    values = parse(argv)
    if "send" in values:
        print(send_run(find_run(values["send"])))
        return 0
    runs_dir = Path(values.get("runs", "runs"))
    uri = values.get("uri", default_store(runs_dir))
    store = sqlite_path(uri)
    if store is not None and not store.exists():
        raise InputError(f"{uri}: there is no such store; run `headrace train`, or give runs=DIR or uri=URI")
    if uri.startswith(("http://", "https://")):
        print(f"{uri} is a server already: open it in a browser")
        return 0
    end_on_kill()
    print(f"starting the MLflow UI on {uri} ...", file=sys.stderr, flush=True)
    return serve(uri, runs_dir, _port(values.get("port", "5000")), on_ready=_tell)


def parse(argv: Sequence[str]) -> dict[str, str]:
    """`runs=`, `uri=`, `--port=N`, `--port N` and `--send RUN` to values by name.

    Raises:
        InputError: another word, or a value is missing.
    """
    values: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.partition("=")
        key = name.removeprefix("--")
        if key not in ("runs", "uri", "port", "send"):
            raise InputError(f"mlflow: unknown word {word!r}; known: runs=DIR, uri=URI, --port=N, --send RUN")
        if not equals and words and name.startswith("--"):
            text = words.pop(0).removeprefix("run=")
        if not text:
            raise InputError(f"mlflow: {name} needs a value")
        values[key] = text
    return values


def _port(text: str) -> int:
    if not text.isdigit():
        raise InputError(f"--port={text}: a whole number is expected")
    return int(text)


def _tell(url: str) -> None:
    print(f"MLflow UI: {url}   (Ctrl-C ends it)", flush=True)
