"""The MLflow run that the runs of a sweep are shown below. mlflow is imported when called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.copier import refusals
from headrace.platform.tracking.mlflow_file import ARTIFACTS_DIR, sqlite_path
from headrace.platform.tracking.mlflow_store import MlflowRun, MlflowSettings, default_store


class ParentRun:
    """An MLflow run above others. It stays open until `close`.

    Args:
        folder: of the sweep; its name is the run's.
        config: of the runs below it.
        params: the keys that are swept, and their values.
        run_id: to go on with; a new one is made where the store lacks it.

    Raises:
        HeadraceError: MLflow, its store or the network refuse it.
    """

    def __init__(
        self, folder: Path, config: TrackingConfig, params: Mapping[str, str], run_id: str | None = None
    ) -> None:
        self.tracking_uri = config.tracking_uri or default_store(folder.resolve().parent)
        self._settings = MlflowSettings(
            tracking_uri=self.tracking_uri,
            experiment=config.experiment,
            run_name=folder.resolve().name,
            artifact_dir=folder.resolve().parent / ARTIFACTS_DIR if sqlite_path(self.tracking_uri) else None,
            params=params,
            tags={"headrace.sweep": str(folder.resolve()), "mlflow.source.name": "headrace sweep", **config.tags},
        )
        with refusals(f"MLflow at {self.tracking_uri} refuses the sweep"):
            run = MlflowRun.open(self._settings, run_id)
            run.describe()
        self.run_id = run.run_id

    def close(self, status: str, files: Sequence[Path]) -> None:
        """Add files and set the status (FINISHED, FAILED, KILLED).

        Raises:
            HeadraceError: MLflow refuses it.
        """
        with refusals(f"MLflow at {self.tracking_uri} refuses the sweep's end"):
            MlflowRun.join(self.tracking_uri, self.run_id, self._settings).close(status, files, {})
