"""What is sent to MLflow about a run besides its points: parameters, tags, data set, a description. No mlflow."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.mlflow_file import ARTIFACTS_DIR, sqlite_path
from headrace.platform.tracking.mlflow_store import MlflowSettings, default_store, flatten
from headrace.workers.telemetry.units import UNITS


def mlflow_settings(
    run_dir: Path, config: TrackingConfig, config_text: str, summary: Mapping[str, Any]
) -> MlflowSettings:
    """What is sent to MLflow about the run of a folder.

    Args:
        summary: content of summary.json, or its facts and provenance before there is one.
    """
    import yaml

    uri = config.tracking_uri or default_store(run_dir.resolve().parent)
    parsed = yaml.safe_load(config_text)
    params = flatten(parsed if isinstance(parsed, Mapping) else {})
    facts = summary.get("facts") or {}
    plan = str(folder.read_json(run_dir / folder.PLAN_FILE).get("name", ""))
    data = facts.get("data")
    tags = {**_source(summary.get("provenance") or {}), **_facts(facts)}
    tags |= {"headrace.plan": plan, "headrace.run_dir": str(run_dir.resolve())}
    if config.parent_run_id is not None:
        tags["mlflow.parentRunId"] = config.parent_run_id
    tags["mlflow.note.content"] = _note(run_dir, facts, params, plan)
    return MlflowSettings(
        tracking_uri=uri,
        experiment=config.experiment,
        run_name=config.run_name or run_dir.resolve().name,
        artifact_dir=run_dir.resolve().parent / ARTIFACTS_DIR if sqlite_path(uri) else None,
        params=params,
        tags={**tags, **config.tags},
        dataset=data if isinstance(data, Mapping) else None,
        system_metrics_every_s=config.system_metrics_every_s,
        look=ui_command(run_dir, config),
    )


def ui_command(run_dir: Path, config: TrackingConfig) -> str:
    """How the run is shown in MLflow."""
    uri = config.tracking_uri
    if uri is None:
        runs_dir = run_dir.parent
        return "headrace mlflow" if runs_dir.resolve() == Path("runs").resolve() else f"headrace mlflow runs={runs_dir}"
    return uri if uri.startswith("http") else f"headrace mlflow uri={uri}"


def _source(source: Mapping[str, Any]) -> dict[str, str]:
    """Who computed it, from which source, on what."""
    tags = {f"headrace.version.{name}": str(version) for name, version in (source.get("versions") or {}).items()}
    tags |= {f"headrace.{key}": str(value) for key, value in (source.get("machine") or {}).items()}
    tags |= {"mlflow.source.name": "headrace train", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
    commit, dirty = source.get("commit"), source.get("dirty")
    return tags | ({"mlflow.source.git.commit": str(commit), "headrace.dirty": str(dirty)} if commit else {})


def _facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Columns of the list of runs: what tells runs apart at a glance."""
    tags = {f"headrace.{key}": str(value) for key, value in facts.items() if isinstance(value, str | int | float)}
    hardware = facts.get("hardware")
    if isinstance(hardware, Mapping) and hardware.get("name"):
        tags["headrace.hardware"] = str(hardware["name"])
    return tags


def _note(run_dir: Path, facts: Mapping[str, Any], params: Mapping[str, str], plan: str) -> str:
    """The description of a run, in Markdown."""
    what = [str(facts[key]) for key in ("model",) if facts.get(key)]
    what += [f"{facts['num_params']:,} parameters"] if isinstance(facts.get("num_params"), int) else []
    lengths = params.get("data.buckets", "[]").strip("[]") or params.get("data.seq_len")
    what += [f"sequences of {lengths} tokens"] if lengths else []
    what += [f"{facts['num_ranks']} rank(s)"] if facts.get("num_ranks") else []
    what += [f"memory plan {plan}"] if plan else []
    units = "; ".join(f"`{suffix}` is {unit}" for suffix, unit in UNITS.items())
    return f"{', '.join(what)}\n\nRun folder: `{run_dir.resolve()}`\n\nUnits, by the end of a metric's name: {units}."


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user's name
        return "unknown"
