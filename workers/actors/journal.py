"""Reports on disk, one JSON line each: what a killed rank had reported and the driver had not fetched is not lost.

A line is one write to the page cache, which outlives the process. No Ray, no torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.storage.core.outside import parse_json, read_regular
from headrace.workers.telemetry.records import RankEvent, StepReport


class ReportJournal:
    """Appends the reports of one rank of one group to a file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def append(self, report: StepReport) -> None:
        """Write one line."""
        os.write(self._fd, (json.dumps(asdict(report), default=str) + "\n").encode())

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file."""
        os.close(self._fd)


def journal_path(run_dir: str | Path, rank: int, attempt: int) -> Path:
    """Where a rank of a group keeps its reports."""
    return Path(run_dir) / "ranks" / f"rank{rank}" / f"reports-attempt{attempt}.jsonl"


def read_journal(path: Path, *, after: int = 0) -> list[StepReport]:
    """Reports of a journal beyond the first `after`; a line that was cut off ends it. No file means no reports."""
    if not path.is_file():
        return []
    reports = []
    for line in read_regular(path).decode(errors="replace").splitlines()[after:]:
        try:
            fields = parse_json(line)
        except ValueError:
            break
        fields["events"] = tuple(RankEvent(**event) for event in fields["events"])
        reports.append(StepReport(**fields))
    return reports
