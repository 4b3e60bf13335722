"""What is recorded of a run, and where. No mlflow, no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Progress(StrEnum):
    """What the terminal shows while a run goes on. `auto` is a bar on a terminal and plain lines elsewhere."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    off = "off"


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The records of a run. The run folder is always written; each of the trackers that are on gets a copy.

    Copies are made asynchronously: losing a tracker never stops or slows the run.

    Args:
        mlflow: copy the run to MLflow.
        tensorboard: copy it to TensorBoard's event files in the run folder; needs headrace[tensorboard].
        wandb: copy it to Weights & Biases, into the project that `experiment` names; needs headrace[wandb]. Its own
            variables hold: WANDB_MODE=offline writes into the run folder and needs no network.
        tracking_uri: of the MLflow store (sqlite:///FILE, http://HOST:PORT); None means the file mlflow.db in the
            folder that holds the run folders. Plain folders are refused: MLflow 3 no longer takes them.
        experiment: MLflow experiment or W&B project, made when it is not there.
        run_name: name in MLflow and W&B; None means the run folder's name.
        tags: further MLflow tags.
        parent_run_id: MLflow run below which this one is shown; `headrace sweep` sets it.
        progress: what the terminal shows.
        system_metrics_every_s: seconds between samples of the node's CPU, memory, disk, network and GPUs, to MLflow
            only; 0 means off.
    """

    mlflow: bool = False
    tensorboard: bool = False
    wandb: bool = False
    tracking_uri: str | None = None
    experiment: str = "headrace"
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    progress: Progress = Progress.auto
    system_metrics_every_s: float = 10.0
