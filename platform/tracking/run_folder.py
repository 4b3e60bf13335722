"""The files of a run folder: names, whole-or-nothing writes, JSON lines that survive a kill. No mlflow, no torch."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import open_regular, parse_json, read_regular

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
TRANSFERS_FILE = "transfers.parquet"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
MLFLOW_FILE = "mlflow.json"
# Columns of a line of metrics.jsonl that are no metric.
STEP, LOSS, GRAD_NORM, UNIX_S, NUM_RANKS = "step", "loss", "grad_norm", "unix_s", "num_ranks"
FIRST_OF_START = "first_of_start"
NOT_METRICS = (STEP, LOSS, GRAD_NORM, UNIX_S, NUM_RANKS, FIRST_OF_START)


def legal_json(value: Any) -> Any:
    """The value without what JSON has no word for: NaN and infinities become null, others text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): legal_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [legal_json(item) for item in value]
    return str(value)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write legal JSON, whole or not at all."""
    write_text(path, json.dumps(legal_json(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where the file is missing or damaged (a killed run's report shows what is there)."""
    try:
        value = parse_json(read_regular(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


class JsonLines:
    """Appends objects to a file, one a line, from any thread; every line has left the process when append returns.

    A line that was cut by a kill is removed when the file is opened again. When the disk is full, lines wait in memory
    and are tried again with the next append; what a failed write left behind is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = _end_of_last_line(self._fd)
        os.ftruncate(self._fd, self._end)

    @property
    def num_waiting(self) -> int:
        """Lines that the disk has not taken yet."""
        return len(self._waiting)

    def append(self, record: Mapping[str, Any]) -> OSError | None:
        """Add one line. Returns why the disk refused it, if it did."""
        text = json.dumps(legal_json(record), ensure_ascii=False, allow_nan=False)
        with self._lock:
            self._waiting.append(text.encode("utf-8", errors="replace") + b"\n")
        return self.flush()

    def flush(self) -> OSError | None:
        """Try the waiting lines. Returns why the disk refused them, if it did."""
        with self._lock:
            while self._waiting:
                line = self._waiting[0]
                try:
                    written = os.pwrite(self._fd, line, self._end)
                    if written < len(line):
                        raise OSError(errno.ENOSPC, "the disk took a part of a line", str(self.path))
                except OSError as error:
                    os.ftruncate(self._fd, self._end)
                    return error
                self._end += written
                self._waiting.pop(0)
        return None

    def close(self) -> None:
        """Try what waits once more, then close the file."""
        self.flush()
        os.close(self._fd)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Whole lines from byte `offset` on: (object, offset behind its line). Damaged lines are left out."""
    try:
        source = open_regular(path)
    except FileNotFoundError:
        return
    with source:
        source.seek(offset)
        for line in source:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                value = parse_json(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value, offset


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl in order, each once.

    A run that went back to a checkpoint writes steps again: a line takes back every earlier line of its step or a
    later one, so what is returned is the history of the weights that the run ended with.
    """
    steps: list[dict[str, Any]] = []
    for line, _ in read_lines(path):
        if not isinstance(line.get(STEP), int):
            continue
        while steps and steps[-1][STEP] >= line[STEP]:
            steps.pop()
        steps.append(line)
    return steps


def find_run(text: str, runs_dir: Path = Path("runs")) -> Path:
    """The run folder that a user names: a folder, a name below runs/, or `last` for the newest run.

    Raises:
        InputError: there is no such folder, or it is not a run's.
    """
    if text == "last":
        folders = [path.parent for path in runs_dir.glob(f"*/{CONFIG_FILE}")]
        if not folders:
            raise InputError(f"run=last: there is no run in {runs_dir.resolve()}; run `headrace train` first")
        return max(folders, key=lambda folder: folder.stat().st_mtime)
    for folder in (Path(text), runs_dir / text):
        if (folder / METRICS_FILE).exists() or (folder / CONFIG_FILE).exists():
            return folder
    if Path(text).is_dir():
        raise InputError(f"run={text}: not a run folder, it has neither {CONFIG_FILE} nor {METRICS_FILE}")
    raise InputError(f"run={text}: no such folder; give a folder that a run wrote, or `last`")


def _end_of_last_line(fd: int) -> int:
    end = os.fstat(fd).st_size
    block = 1 << 16
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
