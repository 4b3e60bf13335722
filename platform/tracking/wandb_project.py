"""A run's copy in Weights & Biases. Imports wandb when a run is opened; its own variables (WANDB_MODE, ...) hold."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.platform.tracking.run_folder import STEP, finite_metrics

OFFLINE = "offline"


@dataclass(frozen=True)
class WandbProject:
    """See Tracker.

    Args:
        run_dir: absolute; W&B keeps its files in its folder `wandb`.
        project / run_name: names in W&B. params: flat configuration.
    """

    run_dir: Path
    project: str
    run_name: str
    params: Mapping[str, str]
    name = "WandB"
    state_file = "wandb.json"

    @property
    def tracking_uri(self) -> str:
        """Project, and the folder of its files."""
        return f"{self.project} ({self.run_dir / 'wandb'})"

    @property
    def look(self) -> str:
        """The command that sends a run that was recorded offline; otherwise the project's name."""
        folder = self.run_dir / "wandb"
        offline = os.environ.get("WANDB_MODE") == OFFLINE
        return f"wandb sync {folder}/offline-run-*" if offline else f"project {self.project}"

    def open_run(self, run_id: str | None) -> WandbRun:
        """Continue the run, or begin one."""
        return WandbRun(self, run_id)


class WandbRun:
    """See TrackedRun."""

    def __init__(self, project: WandbProject, run_id: str | None) -> None:
        import wandb

        # It changes neither the terminal nor what the process prints, and takes no signals.
        settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True)
        self._run = wandb.init(
            project=project.project,
            name=project.run_name,
            id=run_id,
            resume="allow",
            dir=str(project.run_dir),
            config=dict(project.params),
            settings=settings,
        )
        self.run_id = str(self._run.id)

    def describe(self) -> None:
        """The configuration went with the opening of the run."""

    def points(self, line: Mapping[str, Any]) -> list[Any]:
        """Step, and its metrics."""
        return [(int(line[STEP]), finite_metrics(line))]

    def log(self, points: Sequence[Any]) -> None:
        """Hand the steps to W&B's own process, which keeps them until its server has them."""
        for step, values in points:
            self._run.log(values, step=step)

    def sample_system(self, num_samples: int) -> int:
        """W&B samples by itself."""
        return num_samples

    def close(self, status: str, artifacts: Sequence[Path], tags: Mapping[str, str]) -> None:
        """Add the files and the outcome, and end the run."""
        self._run.summary.update(dict(tags))
        for path in artifacts:
            if path.exists():
                self._run.save(str(path), base_path=str(path.parent), policy="now")
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)
