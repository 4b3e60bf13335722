"""Steps whose loss or gradient is not finite: their rows are written down; the policy stops the run or skips them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch.distributed as dist

from headrace.storage.core.durable import write_durably
from headrace.storage.core.errors import ErrorId, HeadraceError
from headrace.workers.data.loader import TokenLoader
from headrace.workers.job import TrainJob
from headrace.workers.parallel.dims import Axis, resolve_dims
from headrace.workers.parallel.process_group import gathered
from headrace.workers.train.config import NonFinite
from headrace.workers.train.engine import StepResult

FOLDER = "non_finite"


class TrainingDiverged(HeadraceError):
    """The loss or the gradient is not finite. The weights are those before the step, and nothing was saved since."""

    id = ErrorId.training_diverged


class NonFiniteSteps:
    """Counts and records the steps of a run that were not finite. All ranks call alike.

    Args:
        num_skipped: steps of the run that were skipped so far.
    """

    def __init__(self, job: TrainJob, loader: TokenLoader) -> None:
        self._job, self._loader = job, loader
        self.num_skipped = 0

    def meet(self, step: int, result: StepResult) -> str:
        """Record a step that was not finite, and skip it where the policy allows that.

        Args:
            step: index of the optimizer step, from 0; people read it as number `step + 1`.

        Returns:
            What happened, one sentence.

        Raises:
            TrainingDiverged: on all ranks: the policy is to stop, or there were too many such steps.
        """
        train = self._job.train
        path = self._write(step, result)
        what = f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; its rows are listed in {path}"
        if train.non_finite is NonFinite.stop:
            raise TrainingDiverged(
                f"{what}. Lower optim.lr, raise optim.warmup_steps, look at these rows, or set train.non_finite=skip. "
                "The newest checkpoint is from before it"
            )
        if self.num_skipped >= train.max_skipped_steps:
            raise TrainingDiverged(
                f"{what}. {self.num_skipped} steps before it were skipped (train.max_skipped_steps="
                f"{train.max_skipped_steps}). The newest checkpoint is from before it"
            )
        self.num_skipped += 1
        return f"{what}. It was skipped, number {self.num_skipped} of at most {train.max_skipped_steps}"

    def _write(self, step: int, result: StepResult) -> Path:
        path = Path(self._job.run_dir) / FOLDER / f"step_{step + 1:06d}.json"
        dims = resolve_dims(self._job.parallel, dist.get_world_size())
        per_rank = enumerate(gathered(result.bad_micro_batches))
        bad = {(dims.coordinate(rank)[Axis.data], i) for rank, own in per_rank for i in own}
        rows = [of_ranks.tolist() for of_ranks in self._loader.index.global_rows(step)]
        record = {
            "step": step + 1,
            "loss": str(result.loss),
            "grad_norm": str(result.grad_norm),
            "data": self._loader.data.where,
            "data_digest": self._loader.data.digest,
            "micro_batches": [
                {"micro_batch": i, "rank": rank, "rows": own, "loss_is_finite": (rank, i) not in bad}
                for i, of_ranks in enumerate(rows)
                for rank, own in enumerate(of_ranks)
            ],
        }
        if dist.get_rank() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_durably(path, json.dumps(record, indent=1).encode())
            except OSError as error:
                warnings.warn(f"{path}: the rows of the step could not be written: {error}", stacklevel=2)
        return path
