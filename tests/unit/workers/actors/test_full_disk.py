"""A rank whose disk is full trains on, and what it could not write is written later."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from headrace.storage.core.json_lines import JsonLines, read_lines
from headrace.storage.core.records import Direction, Medium, TransferRecord
from headrace.storage.transfer_log import TransferLog
from headrace.workers.actors.journal import ReportJournal, journal_path, read_journal
from headrace.workers.telemetry.records import StepReport

Mount = Callable[[str], Path]
TRAIN = """
import sys, threading, time, warnings
from pathlib import Path
from types import SimpleNamespace
from headrace.storage.config import TiersConfig
from headrace.workers.actors.rank import RankShell
from headrace.workers.actors.status import RankPhase
from headrace.workers.job import RankContext
from headrace.workers.telemetry.records import RankOutcome, RankResult, StepReport

def train(job, context, *, on_step, should_stop, on_stage, **_):
    for step in range(1, 51):
        print("x" * 1000)
        print("y" * 1000, file=sys.stderr, flush=True)
        warnings.warn("z" * 1000)
        on_step(StepReport(step, 0, {"loss/train": 1.0}))
    return RankResult(0, RankOutcome.finished, 50)

told = sys.__stdout__ = open(sys.argv[2], "w")
shell = RankShell(0, run=train)
shell.start(SimpleNamespace(run_dir=sys.argv[1], tiers=TiersConfig()), RankContext())
while True:
    status = shell.poll()
    if status.phase is not RankPhase.running:
        break
    time.sleep(0.01)
told.write(f"{status.phase.value} {status.num_reports} {status.failure} {len(shell.stacks()) > 100}")
"""


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", 0) as file:
        while True:
            file.write(b"x" * 4096)
    return ballast


@pytest.mark.parametrize("log_is_open", [True, False])
def test_a_rank_trains_on_and_prints_on(log_is_open: bool, mount_tmpfs: Mount, tmp_path: Path) -> None:
    disk = mount_tmpfs("size=256k")
    if log_is_open:
        (disk / "run" / "logs").mkdir(parents=True)
        (disk / "run" / "logs" / "rank0.log").touch()
    fill(disk)
    subprocess.run([sys.executable, "-c", TRAIN, str(disk / "run"), str(tmp_path / "told")], check=True)
    assert (tmp_path / "told").read_text() == "finished 50 None True"


def test_reports_wait_for_room(mount_tmpfs: Mount) -> None:
    disk = mount_tmpfs("size=256k")
    ballast = fill(disk)
    path = journal_path(disk / "run", 0, 0)
    reports = [StepReport(step, 0, {"loss/train": 1.0 / step}) for step in range(1, 11)]
    with ReportJournal(path) as journal:
        for report in reports[:9]:
            journal.append(report)
        assert read_journal(path) == []
        ballast.unlink()
        journal.append(reports[9])
        assert read_journal(path) == reports


def test_lines_wait_for_room_in_the_middle_of_a_file(mount_tmpfs: Mount) -> None:
    disk = mount_tmpfs("size=256k")
    lines = JsonLines(disk / "metrics.jsonl")
    assert lines.append({"step": 1}) is None
    ballast = fill(disk)
    errors = [lines.append({"step": step, "text": "x" * 6000}) for step in (2, 3)]
    assert [error is None for error in errors] == [False, False]
    ballast.unlink()
    assert lines.append({"step": 4}) is None
    assert [line["step"] for line, _ in read_lines(disk / "metrics.jsonl")] == [1, 2, 3, 4]


def test_moves_that_the_disk_does_not_take_are_counted(mount_tmpfs: Mount) -> None:
    disk = mount_tmpfs("size=256k")
    ballast = fill(disk)
    log = TransferLog(spool_folder=disk / "ranks" / "rank0", spool_records=10)

    def move(first: int, last: int) -> None:
        for number in range(first, last + 1):
            log.append(TransferRecord(f"s{number}", 4096, Medium.host, Direction.store, 0.0, 0.0, 1.0))

    with pytest.warns(UserWarning, match="left out"):
        move(1, 25)
    ballast.unlink()
    move(26, 32)
    log.write_parquet(disk / "transfers.parquet")
    import pyarrow.parquet as pq

    assert log.num_left_out == 20
    assert pq.read_table(disk / "transfers.parquet").num_rows == 12
    assert log.moved_bytes[Medium.host, Direction.store] == 32 * 4096
