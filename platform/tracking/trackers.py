"""Which trackers a run is copied to, and whether their packages are there. Imports none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.copier import Tracker
from headrace.platform.tracking.mlflow_facts import mlflow_settings
from headrace.platform.tracking.tensorboard_files import TensorboardFiles
from headrace.platform.tracking.wandb_project import WandbProject
from headrace.storage.core.errors import ErrorId, MachineError

OPTIONAL = ("tensorboard", "wandb")


def check_packages(config: TrackingConfig) -> None:
    """Raises MachineError, with the command that installs it, where a tracker that is on is not installed."""
    for package in OPTIONAL:
        if getattr(config, package) and importlib.util.find_spec(package) is None:
            raise MachineError(
                f"tracking.{package}=true: the package {package} is not installed here: pip install "
                f"'headrace[{package}]' (from a checkout: .venv/bin/pip install {package})",
                id=ErrorId.package_missing,
            )


def trackers_of(run_dir: Path, config: TrackingConfig, config_text: str, summary: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that are on, with what they are told about the run.

    Args:
        summary: content of summary.json, or its facts and provenance before there is one.
    """
    settings = mlflow_settings(run_dir, config, config_text, summary)
    found: list[Tracker] = [settings] if config.mlflow else []
    if config.tensorboard:
        found.append(TensorboardFiles(run_dir.resolve(), config_text))
    if config.wandb:
        found.append(WandbProject(run_dir.resolve(), config.experiment, settings.run_name, settings.params))
    return found
