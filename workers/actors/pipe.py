"""A rank in a plain process: RankShell behind a socket, the counterpart of the Ray actor. No Ray.

Started as `python -m headrace.workers.actors.pipe RANK DESCRIPTOR`; ends with its driver.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from headrace.storage.core.owners import die_with_parent
from headrace.workers.actors.rank import RankShell


def serve(shell: RankShell, connection: Connection[Any, Any]) -> None:
    """Answer (ticket, method, args) with (ticket, value, error) until the other side closes."""
    while True:
        try:
            ticket, method, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Any, Any, Exception | None] = (ticket, getattr(shell, method)(*args), None)
        except Exception as error:
            answer = (ticket, None, error)
        try:
            connection.send(answer)
        except OSError:
            return


def main(argv: list[str]) -> None:
    """Serve one rank on an inherited socket."""
    die_with_parent()  # also while it imports or sits in a call
    # Ctrl-C reaches every process of the terminal; who stops when is the driver's to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(RankShell(int(argv[0])), Connection(int(argv[1])))
    os._exit(0)  # the training thread may sit in a collective


if __name__ == "__main__":
    main(sys.argv[1:])
