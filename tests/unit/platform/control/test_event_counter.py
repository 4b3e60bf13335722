"""Events are counted by kind and cause, those inside a report too, and everything reaches the recorder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from headrace.platform.control import event_counter
from headrace.platform.control.event_counter import EventCounter
from headrace.workers.telemetry.records import RankEvent, StepReport


class FakeCounter:
    """Keeps its counts."""

    made: list[FakeCounter]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.tag_keys = name, tag_keys
        self.counts: dict[tuple[str, ...], int] = {}
        self.made.append(self)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def inc(self, value: int, tags: dict[str, str]) -> None:
        key = tuple({**self.tags, **tags}[name] for name in self.tag_keys)
        self.counts[key] = self.counts.get(key, 0) + value


class Kept:
    """A recorder that keeps what it gets."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_report(self, report: StepReport) -> None:
        self.found.append(report)

    def on_event(self, event: RankEvent) -> None:
        self.found.append(event)

    def on_plan(self, record: Mapping[str, Any]) -> None:
        self.found.append(record)

    def on_stage(self, text: str) -> None:
        self.found.append(text)

    def on_part(self, text: str) -> None:
        self.found.append(text)


def test_every_event_is_counted_once_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCounter.made = []
    monkeypatch.setattr(event_counter, "Counter", FakeCounter)
    kept = Kept()
    counter = EventCounter(kept, "my-run")
    lost = RankEvent("group_restarted", "", {"kind": "lost", "rank": 1})
    diverged = RankEvent("run_failed", "", {"kind": "raised", "id": "training_diverged"})
    report = StepReport(3, 0, {}, (RankEvent("tier_drift", "", {"tier": "ssd"}), RankEvent("step_skipped", "")))
    counter.on_event(lost)
    counter.on_event(lost)
    counter.on_event(diverged)
    counter.on_report(report)
    counter.on_stage("ranks")
    counter.on_part("chunk 1/2")
    assert kept.found == [lost, lost, diverged, report, "ranks", "chunk 1/2"]
    assert [made.name for made in FakeCounter.made] == ["headrace_events"]
    assert FakeCounter.made[0].counts == {
        ("my-run", "group_restarted", "lost"): 2,
        ("my-run", "run_failed", "training_diverged"): 1,
        ("my-run", "tier_drift", ""): 1,
        ("my-run", "step_skipped", ""): 1,
    }
