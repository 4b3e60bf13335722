"""The files of a run folder: names, whole-or-nothing writes, the history of its steps. No mlflow, no torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.storage.core.json_lines import legal_json, read_lines
from headrace.storage.core.outside import parse_json, read_regular

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
TRANSFERS_FILE = "transfers.parquet"
SUMMARY_FILE = "summary.json"
# Only while a run is under way, or after it was killed: how far its step at hand is.
PART_FILE = "step_part.json"
REPORT_FILE = "report.html"
MLFLOW_FILE = "mlflow.json"
# Columns of a line of metrics.jsonl that are no metric.
STEP, LOSS, GRAD_NORM, UNIX_S, NUM_RANKS = "step", "loss", "grad_norm", "unix_s", "num_ranks"
FIRST_OF_START = "first_of_start"
PART = "part"  # of step_part.json
NOT_METRICS = (STEP, LOSS, GRAD_NORM, UNIX_S, NUM_RANKS, FIRST_OF_START)


def finite_metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl that are finite: axes of plots break with others."""
    return {
        name: float(value)
        for name, value in line.items()
        if name not in NOT_METRICS and isinstance(value, int | float) and math.isfinite(value)
    }


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


def read_predicted(run_dir: Path) -> dict[str, float]:
    """What the plan of a run predicts, by metric name; nothing where plan.json is missing or damaged."""
    values = read_json(run_dir / PLAN_FILE).get("predicted")
    found = values if isinstance(values, dict) else {}
    largest = sys.float_info.max
    return {k: v for k, v in found.items() if isinstance(v, int | float) and -largest <= v <= largest}


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
