"""A driver in a process of its own: python driver.py PICKLED_JOB CLUSTER. Prints reports and events.

CLUSTER: fields of the ClusterConfig, as JSON.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

from headrace.platform.control import controller
from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.launch import launch
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankEvent, StepReport


class Printer:
    """A recorder that prints."""

    def on_report(self, report: StepReport) -> None:
        values = [report.metrics[name] for name in (names.LOSS_TRAIN, names.GRAD_NORM)]
        print("step", report.step, report.rank, *values, flush=True)

    def on_event(self, event: RankEvent) -> None:
        print(event.kind, event.text.replace("\n", " "), dict(event.facts), flush=True)

    def on_stage(self, text: str) -> None:
        pass

    def on_plan(self, record: Any) -> None:
        pass

    def on_part(self, text: str) -> None:
        pass


def main() -> int:
    path = Path(sys.argv[1])
    job = pickle.loads(path.read_bytes())
    fields = json.loads(sys.argv[2])
    cluster = ClusterConfig(**{**fields, "launcher": Launcher(fields["launcher"])}, dashboard=False)
    controller.POLL_S = 0.02  # a tiny job would be over between two polls
    folder = path.parent / "tiers"
    outcome = launch(job, cluster, Printer(), host_bytes=1 << 20, ssd_bytes=1 << 20, ssd_folders=[folder])
    print("slabs", json.dumps(outcome.facts.get("slabs")), flush=True)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
