"""Reports on disk, one JSON line each: what a killed rank had reported and the driver had not fetched is not lost.

A line is one write to the page cache, which outlives the process. No Ray, no torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.storage.core.json_lines import JsonLines, read_lines
from headrace.workers.telemetry.records import RankEvent, StepReport


class ReportJournal:
    """Appends the reports of one rank of one group to a file; what was there before is gone.

    While the disk is full, reports wait in memory. The file is locked as long as the rank's process runs.
    """

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink()
        self._lines = JsonLines(path, hold=True)

    def append(self, report: StepReport) -> None:
        """Write one line."""
        self._lines.append_text(json.dumps(asdict(report), default=str))

    def __enter__(self) -> Self:
        """The journal itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the file."""
        self._lines.close()


def journal_path(run_dir: str | Path, rank: int, attempt: int) -> Path:
    """Where a rank of a group keeps its reports."""
    return Path(run_dir) / "ranks" / f"rank{rank}" / f"reports-attempt{attempt}.jsonl"


def journals_of(run_dir: str | Path) -> dict[int, dict[int, Path]]:
    """Journals that are there, by attempt and rank: of a group that runs, or whose driver was killed."""
    found: dict[int, dict[int, Path]] = {}
    for path in Path(run_dir).glob("ranks/rank*/reports-attempt*.jsonl"):
        rank, attempt = path.parent.name.removeprefix("rank"), path.stem.removeprefix("reports-attempt")
        if rank.isdigit() and attempt.isdigit():
            found.setdefault(int(attempt), {})[int(rank)] = path
    return {attempt: found[attempt] for attempt in sorted(found)}


def read_journal(path: Path, *, after: int = 0) -> list[StepReport]:
    """Reports of a journal beyond the first `after`; a line that was cut off is left out. No file: no reports."""
    reports = []
    for number, (fields, _) in enumerate(read_lines(path)):
        if number < after:
            continue
        with suppress(KeyError, TypeError):  # a line of another form
            fields["events"] = tuple(RankEvent(**event) for event in fields["events"])
            reports.append(StepReport(**fields))
    return reports
