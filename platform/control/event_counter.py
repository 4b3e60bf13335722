"""Counts a run's events in Ray's metrics, where alerts see them. The process is connected to Ray."""

from __future__ import annotations

from ray.util.metrics import Counter

from headrace.platform.control.states import Recorder
from headrace.workers.telemetry.exported import EVENTS, exported_name, help_text
from headrace.workers.telemetry.records import RankEvent, StepReport


class EventCounter:
    """A recorder that counts every event by run, `kind` and `cause`, and passes everything on.

    A counter stays in Ray's exporter after the run's end, which a gauge does not: so the event that ended a run is
    seen too.

    Args:
        recorder: gets everything.
        run: label of the counts.
    """

    def __init__(self, recorder: Recorder, run: str) -> None:
        self._recorder = recorder
        self._counter = Counter(exported_name(EVENTS), help_text(EVENTS), tag_keys=("run", "kind", "cause"))
        self._counter.set_default_tags({"run": run})
        self.on_stage, self.on_part, self.on_plan = recorder.on_stage, recorder.on_part, recorder.on_plan

    def on_report(self, report: StepReport) -> None:
        """See Recorder."""
        for event in report.events:
            self._count(event)
        self._recorder.on_report(report)

    def on_event(self, event: RankEvent) -> None:
        """See Recorder."""
        self._count(event)
        self._recorder.on_event(event)

    def _count(self, event: RankEvent) -> None:
        self._counter.inc(1, {"kind": event.kind, "cause": cause_of(event)})


def cause_of(event: RankEvent) -> str:
    """What brought an event about, in one word: of a failure its id, else how the rank was lost; else nothing."""
    return str(event.facts.get("id") or event.facts.get("kind") or "")
