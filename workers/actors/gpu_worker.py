"""The actor of one torch.distributed rank: RankShell, with the gauges of its node's metrics endpoint."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import ray.util

from headrace.storage.core.ports import free_port
from headrace.workers.actors.gauges import RankGauges
from headrace.workers.actors.rank import RankShell, log_path, step_words
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.telemetry.exported import PREDICTED, STEP
from headrace.workers.telemetry.records import StepReport
from headrace.workers.train.predicted import predicted_of_step


class GpuWorker(RankShell):
    """One rank under Ray. A rank whose process has ended is not restarted alone: the group is.

    Args:
        run_name: label of the gauges.
    """

    def __init__(self, rank: int, run_name: str) -> None:
        self._gauges = RankGauges(run_name, rank)
        self._ray_log = os.fdopen(os.dup(2), "w", buffering=1)  # what the actor's page on Ray's dashboard shows first
        super().__init__(rank, also_on_report=self._publish)

    def start(self, job: TrainJob, context: RankContext) -> None:
        """As RankShell. What the plan expects is published at once, beside what will be measured."""
        predicted = predicted_of_step(job, job.data.buckets or [job.data.seq_len])
        self._gauges.update({STEP: 0, **{PREDICTED + name: value for name, value in predicted.items()}})
        self._tell_ray(
            f"{Path(job.run_dir).name} rank {self.rank}: the whole log is {log_path(job.run_dir, self.rank)}"
        )
        super().start(job, context)

    def rendezvous(self, *, one_node: bool) -> tuple[str, int]:
        """Address and a free port of this node, for torch.distributed where this is rank 0."""
        address = "127.0.0.1" if one_node else ray.util.get_node_ip_address()
        return address, free_port()

    def _publish(self, report: StepReport) -> None:
        self._gauges.update({STEP: report.step, **report.metrics})
        self._tell_ray(step_words(report))

    def _tell_ray(self, line: str) -> None:
        with suppress(OSError):  # a full disk
            print(line, file=self._ray_log)
