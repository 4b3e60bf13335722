"""The MLflow UI on this machine's store, and runs that are missing in MLflow. Starts MLflow as a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from headrace.platform.servers import HOST, Server, check_port
from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.mlflow_file import ARTIFACTS_DIR, ready_store, sqlite_path
from headrace.platform.tracking.run_owner import own_run_folder
from headrace.platform.tracking.settle import settle
from headrace.storage.core.errors import InputError
from headrace.storage.core.outside import yaml_text


def serve(tracking_uri: str, runs_dir: Path, port: int, *, on_ready: Callable[[str], None]) -> int:
    """Run the MLflow UI until it is interrupted; it listens on this machine only.

    Args:
        tracking_uri: of a SQL store. runs_dir: where the server would put artifacts of experiments made in the UI.
        on_ready: called with the URL once the UI answers.

    Returns:
        0 after an interrupt.

    Raises:
        InputError: the port is taken. HeadraceError: the server did not start; the end of its log is in the
            message. As ready_store.
    """
    check_port(port)
    runs_dir.mkdir(parents=True, exist_ok=True)
    artifacts = (runs_dir / ARTIFACTS_DIR).resolve().as_uri()
    if (store := sqlite_path(tracking_uri)) is not None:
        ready_store(store, artifacts)
    words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    words += ["--default-artifact-root", artifacts, "--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = Server("the MLflow server", words, runs_dir.resolve() / "mlflow_server.log", environment)
    url = f"http://{HOST}:{port}"
    with server.running(f"{url}/health"):
        on_ready(url)
        try:
            server.wait()
        except KeyboardInterrupt:
            return 0


def send_run(run_dir: Path) -> str:
    """Copy a run, or what was missed of it, to MLflow and to the other trackers that its configuration names.

    Returns:
        A sentence for the user for each.

    Raises:
        InputError: the folder has no configuration of a run, or the run is not finished. HeadraceError: a
            tracker refuses it; says why. MachineError: a tracker is not installed.
    """
    import yaml

    from headrace.platform.tracking.config import TrackingConfig
    from headrace.platform.tracking.copier import refusals, send
    from headrace.platform.tracking.recorder import ARTIFACTS, MLFLOW_STATUS
    from headrace.platform.tracking.trackers import check_packages, trackers_of

    path = run_dir / folder.CONFIG_FILE
    try:
        text = yaml_text(path)
        found = (yaml.safe_load(text) or {}).get("tracking") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read as a run's configuration: {error}") from error
    kept = {
        key: found[key]
        for key in ("tracking_uri", "experiment", "run_name", "tags", "parent_run_id", "tensorboard", "wandb")
        if found.get(key)
    }
    config = TrackingConfig(**kept, mlflow=True, system_metrics_every_s=0.0)
    check_packages(config)
    sentences = []
    with own_run_folder(run_dir):  # a run that goes on sends its points itself
        settle(run_dir)
        summary = folder.read_json(run_dir / folder.SUMMARY_FILE)
        outcome = str(summary.get("outcome", "lost"))
        status, files = MLFLOW_STATUS.get(outcome, "FAILED"), [run_dir / name for name in ARTIFACTS]
        for tracker in trackers_of(run_dir, config, text, summary):
            with refusals(f"{tracker.name} at {tracker.tracking_uri} refuses the run"):
                run_id = send(run_dir, tracker, status, files, {"headrace.outcome": outcome})
            sentences.append(f"{run_dir} is in {tracker.tracking_uri} as run {run_id}")
    return "\n".join(sentences)
