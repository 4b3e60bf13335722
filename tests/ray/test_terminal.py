"""A whole run as a user has it: in a terminal of 80 columns, with a Ray of its own, until the terminal is closed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.workers.train.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.ray
STEPS = 1_000_000
WORDS = ["debug=cpu_tiny", "cluster.num_workers=2", f"train.steps={STEPS}", "cluster.address=local", "run.dir=run"]


@dataclass
class Terminal:
    """A process in a terminal, and what it has written."""

    process: subprocess.Popen[bytes]
    master: int
    seen: str = ""

    def read_until(self, pattern: str, timeout_s: float = 600.0) -> None:
        """Read until the text has come."""
        until_s = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            assert time.monotonic() < until_s, self.seen[-3000:]
            if select.select([self.master], [], [], 1.0)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        """What was drawn, without colours."""
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen)
        return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """`headrace train WORDS` as the leader of a terminal of 80 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def own_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    env = {**os.environ, "TERM": "xterm-256color", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("COLUMNS", "RAY_ADDRESS", "HEADRACE_CONF", "HEADRACE_OVERRIDES"):
        env.pop(name, None)
    words = [sys.executable, "-m", "headrace.platform.cli.main", "train", *WORDS]
    with subprocess.Popen(
        words, cwd=tmp_path, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=own_terminal
    ) as process:
        os.close(slave)
        yield Terminal(process, master)
        process.kill()


def test_a_run_in_a_narrow_terminal_listens_on_loopback_and_saves_when_the_terminal_closes(
    terminal: Terminal, tmp_path: Path, sockets
) -> None:
    terminal.read_until(rf"[1-9]\d*/{STEPS}")
    bars = [line for line in terminal.lines if f"/{STEPS}" in line]
    for stage in ("Ray", "ranks"):
        assert any(f"starting: {stage}" in line for line in bars), (stage, bars)
    assert all(len(line.rstrip()) <= 80 and "ETA" in line for line in bars)
    tree = sockets.descendants(terminal.process.pid)
    names = " ".join(sockets.command(pid) for pid in tree)
    assert all(name in names for name in ("gcs_server", "raylet", "dashboard.py", "ray::GpuWorker"))
    assert len(sockets.listeners(tree)) >= 10  # head, agents, metrics, dashboard, workers, the ranks' rendezvous
    assert sockets.open_to_others(tree) == []
    for pid in tree:
        if "gcs_server" in sockets.command(pid) or "raylet/raylet" in sockets.command(pid):
            # A terminal that closes signals them too; a save that takes minutes needs them.
            assert int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16) & 1
    os.close(terminal.master)  # the terminal is gone: SIGHUP
    assert terminal.process.wait(600) == 3
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").committed_steps()
    log = (tmp_path / "run" / "logs" / "rank1.log").read_text()
    assert re.search(r"step \d+  loss \d", log)
