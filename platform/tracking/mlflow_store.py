"""The only code that calls MLflow: open a run, describe it, log points, close it. Imports mlflow when called."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.platform.tracking.mlflow_file import STORE_FILE, quiet_mlflow, ready_store, sqlite_path, sqlite_uri
from headrace.platform.tracking.run_folder import MLFLOW_FILE, STEP, UNIX_S, finite_metrics
from headrace.storage.core.owners import start_ticks, this_process

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric

MAX_KEY, MAX_VALUE, PARAMS_PER_BATCH = 250, 6000, 100
# What MLflow takes in a name; everything else becomes "_".
ILLEGAL = re.compile(r"[^\w\-. :/]", re.ASCII)
HOST_TAG, PROCESS_TAG, DRIFT_TAG = "headrace.host", "headrace.process", "headrace.config_drift"
# The UI of MLflow 3 opens an experiment of no kind in its view of language model applications.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"


@dataclass(frozen=True)
class MlflowSettings:
    """What is sent to MLflow about a run.

    Args:
        tracking_uri / experiment / run_name: where, and under which name.
        artifact_dir: where a new experiment of a file store keeps artifacts; None leaves it to the server.
        params: flat configuration. tags: everything else worth searching for.
        dataset: folder, digest, num_rows and source of the token rows.
        system_metrics_every_s: 0 means off.
        look: how the run is shown.
    """

    tracking_uri: str
    experiment: str
    run_name: str
    artifact_dir: Path | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    dataset: Mapping[str, Any] | None = None
    system_metrics_every_s: float = 0.0
    look: str = ""
    name = "MLflow"
    state_file = MLFLOW_FILE

    def open_run(self, run_id: str | None) -> MlflowRun:
        """See Tracker."""
        return MlflowRun.open(self, run_id)


def default_store(runs_dir: Path) -> str:
    """URI of the SQLite store beside the run folders."""
    return sqlite_uri((runs_dir / STORE_FILE).resolve())


def legal_name(name: str) -> str:
    """A name that MLflow takes: its letters, no leading slash, no empty or dotted parts, at most 250 characters."""
    parts = [part for part in ILLEGAL.sub("_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:MAX_KEY] or "_"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings to `a.b` keys with values as text, cut to what MLflow stores. Lists are one value."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[legal_name(name)] = str(value)[:MAX_VALUE]
    return flat


class MlflowRun:
    """An open MLflow run. Every method may raise whatever MLflow raises."""

    def __init__(self, client: MlflowClient, run_id: str, settings: MlflowSettings) -> None:
        self._client, self.run_id, self._settings = client, run_id, settings
        self._monitors: list[Any] = []
        self._next_sample_s = time.monotonic() + settings.system_metrics_every_s

    @classmethod
    def open(cls, settings: MlflowSettings, run_id: str | None) -> MlflowRun:
        """Continue `run_id` if the store has it, otherwise make a new run; runs of ended processes are closed."""
        client = _client(settings.tracking_uri)
        experiment_id = _experiment(client, settings)
        _close_dead_runs(client, experiment_id)
        if run_id is not None and _is_there(client, run_id):
            client.update_run(run_id, status="RUNNING", name=settings.run_name)
        else:
            run_id = client.create_run(experiment_id, run_name=settings.run_name).info.run_id
        return cls(client, str(run_id), settings)

    @classmethod
    def join(cls, tracking_uri: str, run_id: str, settings: MlflowSettings) -> MlflowRun:
        """A run that the store has, to add to; its status and its description stay."""
        return cls(_client(tracking_uri), run_id, settings)

    def describe(self) -> None:
        """Parameters, tags and the data set.

        A parameter keeps its first value: a resumed run with another one gets a tag instead.
        """
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(self.run_id).data.params
        params = self._settings.params
        new = [Param(key, value) for key, value in params.items() if key not in there]
        drift = sorted(key for key, value in params.items() if key in there and there[key] != value)
        mine = {HOST_TAG: socket.gethostname(), PROCESS_TAG: this_process().tag}
        if drift:
            mine[DRIFT_TAG] = ", ".join(drift)
        tags = {**self._settings.tags, **mine}
        listed = [RunTag(legal_name(key), value[:MAX_VALUE]) for key, value in tags.items()]
        for start in range(0, max(1, len(new)), PARAMS_PER_BATCH):
            batch = new[start : start + PARAMS_PER_BATCH]
            self._client.log_batch(self.run_id, params=batch, tags=listed if start == 0 else (), synchronous=True)
        if self._settings.dataset is not None:
            self._client.log_inputs(self.run_id, [_dataset(self._settings.dataset)])

    def points(self, line: Mapping[str, Any]) -> list[Metric]:
        """A line of metrics.jsonl as MLflow's points. Values that are not finite are left out: MLflow's axes break."""
        step, timestamp_ms = int(line[STEP]), round(1000 * float(line.get(UNIX_S) or time.time()))
        return _points(finite_metrics(line), step, timestamp_ms)

    def log(self, points: Sequence[Metric]) -> None:
        """Send points; the same ones twice are kept once."""
        self._client.log_batch(self.run_id, metrics=points, synchronous=True)

    def add_files(self, paths: Sequence[Path], folder: str | None = None) -> None:
        """Copy files, into a folder of the run's artifacts."""
        for path in paths:
            self._client.log_artifact(self.run_id, str(path), folder)

    def sample_system(self, num_samples: int) -> int:
        """Log a sample of this node's CPU, memory, disk, network and GPUs when one is due; returns their number."""
        every_s = self._settings.system_metrics_every_s
        if every_s <= 0.0 or time.monotonic() < self._next_sample_s:
            return num_samples
        self._next_sample_s = time.monotonic() + every_s
        self._monitors = self._monitors or _monitors()
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self.log(_points(values, num_samples, round(1000 * time.time())))
        return num_samples + 1

    def close(self, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> None:
        """Copy files, add closing tags, set the status (FINISHED, FAILED, KILLED)."""
        for key, value in tags.items():
            self._client.set_tag(self.run_id, legal_name(key), value[:MAX_VALUE])
        self.add_files([path for path in artifacts if path.exists()])
        self._client.set_terminated(self.run_id, status=status)


def _client(tracking_uri: str) -> MlflowClient:
    quiet_mlflow()
    from mlflow import MlflowClient

    if (path := sqlite_path(tracking_uri)) is not None:
        ready_store(path)
    return MlflowClient(tracking_uri=tracking_uri)


def _experiment(client: MlflowClient, settings: MlflowSettings) -> str:
    from mlflow.exceptions import MlflowException

    there = client.get_experiment_by_name(settings.experiment)
    if there is None:
        where = None if settings.artifact_dir is None else settings.artifact_dir.resolve().as_uri()
        try:
            return str(client.create_experiment(settings.experiment, artifact_location=where, tags={KIND_TAG: KIND}))
        except MlflowException:
            # Another run has just made it.
            there = client.get_experiment_by_name(settings.experiment)
            if there is None:
                raise
    if KIND_TAG not in there.tags:
        client.set_experiment_tag(there.experiment_id, KIND_TAG, KIND)
    return str(there.experiment_id)


def _is_there(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _close_dead_runs(client: MlflowClient, experiment_id: str) -> None:
    """A killed process leaves its run RUNNING for ever: close those of this machine whose process is gone."""
    mine = f"attributes.status = 'RUNNING' and tags.`{HOST_TAG}` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment_id], filter_string=mine, max_results=200):
        pid, _, start = run.data.tags.get(PROCESS_TAG, "").partition("-")
        if pid.isdigit() and start.isdigit() and start_ticks(int(pid)) != int(start):
            client.set_terminated(run.info.run_id, status="KILLED")


def _dataset(data: Mapping[str, Any]) -> DatasetInput:
    """The token rows as MLflow's data set: its name is that of the source, its digest that of the rows."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = str(data.get("source") or data.get("folder"))
    entry = Dataset(
        name=Path(source).name or source,
        digest=str(data.get("digest"))[:36],
        source_type="local",
        source=json.dumps({"uri": source, "rows": str(data.get("folder"))}),
        profile=json.dumps({"num_rows": data.get("num_rows")}),
    )
    return DatasetInput(entry, [InputTag("mlflow.data.context", "training")])


def _points(values: Mapping[str, Any], step: int, timestamp_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [
        Metric(legal_name(name), float(value), timestamp_ms, step)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        found.append(GPUMonitor())
    except Exception:  # no NVML or no GPU: MLflow raises several kinds
        logging.getLogger(__name__).debug("no GPU to sample", exc_info=True)
    return found
