"""A driver in a process of its own: python driver.py PICKLED_JOB LAUNCHER NUM_WORKERS. Prints reports and events."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

from headrace.platform.control.config import ClusterConfig, Launcher
from headrace.platform.control.launch import launch
from headrace.workers.telemetry.records import RankEvent, StepReport


class Printer:
    """A recorder that prints."""

    def on_report(self, report: StepReport) -> None:
        print("step", report.step, flush=True)

    def on_event(self, event: RankEvent) -> None:
        print(event.kind, event.text, dict(event.facts), flush=True)

    def on_stage(self, text: str) -> None:
        pass

    def on_plan(self, record: Any) -> None:
        pass

    def on_part(self, text: str) -> None:
        pass


def main() -> int:
    path = Path(sys.argv[1])
    job = pickle.loads(path.read_bytes())
    cluster = ClusterConfig(launcher=Launcher(sys.argv[2]), num_workers=int(sys.argv[3]), dashboard=False)
    folder = path.parent / "tiers"
    outcome = launch(job, cluster, Printer(), host_bytes=1 << 20, ssd_bytes=1 << 20, ssd_folders=[folder])
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
