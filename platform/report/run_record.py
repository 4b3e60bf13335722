"""What the files of a run folder say about it, also of a run that was killed or still goes on. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.run_owner import owner_of_run
from headrace.platform.tracking.settle import LOST, RUNNING
from headrace.platform.tracking.summary import Steps, summarize
from headrace.storage.core.errors import InputError


class RunRecord(NamedTuple):
    """The steps of a run (lines of metrics.jsonl), and its summary: that of summary.json, brought up to date."""

    steps: Steps
    summary: Mapping[str, Any]


def read_run(run_dir: Path) -> RunRecord:
    """The record of a run folder. The files are the truth; summary.json adds what they cannot say.

    Raises:
        InputError: the folder holds neither a configuration nor metrics.
    """
    if not (run_dir / folder.METRICS_FILE).exists() and not (run_dir / folder.CONFIG_FILE).exists():
        raise InputError(f"{run_dir}: not a run folder, it has neither {folder.CONFIG_FILE} nor {folder.METRICS_FILE}")
    steps = folder.read_metrics(run_dir / folder.METRICS_FILE)
    there = folder.read_json(run_dir / folder.SUMMARY_FILE)
    summary = {**there, **summarize(steps, folder.read_predicted(run_dir), there.get("num_ranks"))}
    # A killed run has an old summary.
    if summary.get("outcome", RUNNING) == RUNNING and owner_of_run(run_dir) is None:
        summary["outcome"] = LOST
    return RunRecord(steps, {"outcome": RUNNING, **summary})
