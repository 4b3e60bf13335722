"""The records of an evaluation: a JSON file, a picture beside it, and its points in MLflow. No torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.mlflow_facts import mlflow_settings
from headrace.platform.tracking.mlflow_store import MlflowRun
from headrace.platform.tracking.provenance import provenance
from headrace.platform.tracking.run_folder import MLFLOW_FILE, STEP, UNIX_S, read_json

Record = Mapping[str, Any]
# Metric names in MLflow; those of a training step stand in telemetry/names.py.
LOSS = "eval/loss"
PERPLEXITY = "eval/perplexity"
PERPLEXITY_BY_POSITION = "eval/perplexity_by_position"


def add_to_run(run_dir: Path, config: TrackingConfig, config_text: str, record: Record, files: list[Path]) -> str:
    """Add an evaluation of a run's checkpoint to the run in MLflow, whose status stays. Returns MLflow's run id.

    Raises:
        Exception: what MLflow raises.
    """
    settings = mlflow_settings(run_dir, config, config_text, {})
    there = read_json(run_dir / MLFLOW_FILE)
    run = MlflowRun.join(str(there["tracking_uri"]), str(there["run_id"]), settings)
    _send(run, record, files)
    return run.run_id


def add_alone(runs_dir: Path, config: TrackingConfig, config_text: str, record: Record, files: list[Path]) -> str:
    """A run of its own in MLflow for an evaluation that belongs to no run. Returns its id. Raises as `add_to_run`.

    Args:
        runs_dir: beside whose folders the store is, where the configuration names none.
    """
    config = replace(config, run_name=config.run_name or f"eval-{record['model']}-{record['seq_len']}")
    facts = {"model": record["model"], "data": record["data"]}
    settings = mlflow_settings(
        runs_dir / "eval", config, config_text, {"facts": facts, "provenance": provenance().to_json()}
    )
    run = MlflowRun.open(settings, None)
    run.describe()
    _send(run, record, files)
    run.close("FINISHED", (), {"mlflow.source.name": "headrace eval"})
    return run.run_id


def is_tracked(run_dir: Path) -> bool:
    """Whether MLflow has the run of a folder."""
    return isinstance(read_json(run_dir / MLFLOW_FILE).get("run_id"), str)


def _send(run: MlflowRun, record: Record, files: list[Path]) -> None:
    """Loss and perplexity at the checkpoint's step; perplexity by position with the position in place of the step."""
    now, step = time.time(), record["step"] or 0
    whole = {LOSS: record["loss"], PERPLEXITY: record["perplexity"]}
    points = run.points({STEP: step, UNIX_S: now, **whole})
    for bucket in record["by_position"]:
        name = f"{PERPLEXITY_BY_POSITION}_step{step}"
        points += run.points({STEP: bucket["end"], UNIX_S: now, name: bucket["perplexity"]})
    run.log(points)
    run.add_files(files, "eval")
