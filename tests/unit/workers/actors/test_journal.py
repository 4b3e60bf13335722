"""Reports on disk come back as they were."""

from __future__ import annotations

import math
from pathlib import Path

from headrace.workers.actors.journal import ReportJournal, journal_path, read_journal
from headrace.workers.telemetry.records import RankEvent, StepReport


def test_round_trip_to_the_bit_and_a_line_cut_off_ends_it(tmp_path: Path) -> None:
    path = journal_path(tmp_path, 3, 1)
    reports = [
        StepReport(1, 3, {"loss/train": 0.1 + 0.2, "perf/step_s": math.inf}),
        StepReport(2, 3, {"loss/train": 1e-310}, (RankEvent("resumed", "é", {"step": 1}),)),
    ]
    with ReportJournal(path) as journal:
        for report in reports:
            journal.append(report)
    assert read_journal(path) == reports
    assert read_journal(path, after=1) == reports[1:]
    path.write_bytes(path.read_bytes()[:-5])
    assert read_journal(path) == reports[:1]


def test_no_file_means_no_reports(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == []
