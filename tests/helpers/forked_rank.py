"""A plain rank that is forked in place of started, where the server of the forks can import it."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

from headrace.helpers.training import fork_server
from headrace.workers.actors import pipe


class ForkedRank:
    """A plain rank as `inline` starts it, forked from a process that has imported what it needs: a new one takes five
    seconds of a core for that. Drivers in processes of their own start theirs as users do."""

    def __init__(self, words: list[str], *, pass_fds: list[int], start_new_session: bool, stdin: int) -> None:
        assert words[:3] == [sys.executable, "-m", pipe.__name__]
        assert start_new_session
        with Connection(os.dup(pass_fds[0])) as ours:
            start = (words[3], ours, dict(os.environ), os.getcwd())
            self._process = fork_server().Process(target=self._serve, args=start, daemon=True)
            self._process.start()

    @staticmethod
    def _serve(rank: str, connection: Connection[Any, Any], environ: dict[str, str], folder: str) -> None:
        os.setsid()
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        pipe.main([rank, str(os.dup(connection.fileno()))])

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return self._process.exitcode
