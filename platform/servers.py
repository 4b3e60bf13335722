"""Servers of other programs (MLflow, Prometheus, Grafana) that run as long as a verb of ours does. No torch, no Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from headrace.storage.core.errors import HeadraceError, InputError
from headrace.storage.core.ports import free_port

HOST = "127.0.0.1"
START_S = 300.0  # a server that ends meanwhile is seen at once


def end_on_kill() -> None:
    """`kill` ends this process as Ctrl-C does, also where a shell's `&` has made it ignore Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class Server:
    """One program that serves.

    Args:
        name: for messages, as "the MLflow server".
        words: its command line. log: file for what it prints; the server runs in the folder of that file.
    """

    def __init__(
        self, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name, self._words, self._log, self._environment = name, words, log, environment
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def running(self, health_url: str) -> Iterator[None]:
        """Start it, wait until the URL answers, and end it and its children with the block.

        Raises:
            HeadraceError: it did not start; the end of its log is in the message.
        """
        with self._log.open("wb") as output:
            # Its own process group: an interrupt reaches us, and we end the server and its workers in order.
            process = self._process = subprocess.Popen(
                self._words,
                cwd=self._log.parent,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_up(process, health_url)
            yield
        finally:
            _end(process)

    def wait(self) -> NoReturn:
        """Wait for its end, which is an error: HeadraceError."""
        assert self._process is not None, "it does not run"
        code = self._process.wait()
        raise HeadraceError(f"{self._name} ended with code {code}; the end of its log: {_tail(self._log)}")

    def _wait_until_up(self, process: subprocess.Popen[bytes], url: str) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if process.poll() is not None:
                raise HeadraceError(f"{self._name} did not start: {_tail(self._log)}")
            if answers(url):
                return
            time.sleep(0.2)
        raise HeadraceError(f"{self._name} did not answer within {START_S:.0f} s: {_tail(self._log)}")


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def check_port(port: int) -> None:
    """Raises InputError when nothing can listen there, and names a port where something can."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port={port}: a port is a number from 1 to 65535")
    try:
        _bind(port)
    except OSError as error:
        raise InputError(f"--port={port}: {error.strerror or error}; --port={free_port()} is free") from error


def port_or_free(port: int) -> int:
    """The port, or one that is free where it is taken."""
    try:
        _bind(port)
    except OSError:
        return free_port()
    return port


def _bind(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _tail(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return f"see {log}"
    return " | ".join(lines[-3:]) or f"nothing in {log}"
