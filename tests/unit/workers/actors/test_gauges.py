"""Gauges are set again and again: Ray drops those that are not."""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest

from headrace.workers.actors import gauges as module
from headrace.workers.actors.gauges import RankGauges
from headrace.workers.telemetry import names
from headrace.workers.telemetry.exported import exported_name


class FakeGauge:
    """Counts its settings."""

    made: dict[str, FakeGauge]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.made, "made twice"
        self.made[name], self.tag_keys, self.values = self, tag_keys, []

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys) - {"tensor"}
        self.tags = tags

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags) if tags else value)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    FakeGauge.made = {}
    monkeypatch.setattr(module, "Gauge", FakeGauge)
    return FakeGauge.made


def test_one_update_is_set_many_times_until_closed(made) -> None:
    gauges = RankGauges("my-run", 3, refresh_s=0.01)
    gauges.update({names.STEP_S: 2.5, names.LOSS_TRAIN: math.nan})
    until_s = time.monotonic() + 600
    while len(made) < 1 or len(made["headrace_perf_step_s"].values) < 5:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    gauges.close()
    gauge = made["headrace_perf_step_s"]
    assert set(gauge.values) == {2.5}
    assert gauge.tags == {"run": "my-run", "rank": "3"}
    assert list(made) == ["headrace_perf_step_s"]  # a loss that is not finite has no place on a board


def test_tensors_share_one_gauge_and_have_labels(made) -> None:
    gauges = RankGauges("my-run", 0, refresh_s=600)
    gauges.update({names.of_tensor(names.HOST_TENSOR_GIB, "out+lse"): 2.0, names.HOST_PEAK_GIB: 3.0})
    gauges.update({names.of_tensor(names.HOST_TENSOR_GIB, "x"): 1.0})
    gauges.set_all()
    gauges.close()
    by_tensor = made["headrace_mem_host_tensor_gib"]
    assert by_tensor.tag_keys == ("run", "rank", "tensor")
    assert by_tensor.values == [(2.0, {"tensor": "out-lse"}), (1.0, {"tensor": "x"})]
    assert made["headrace_mem_host_peak_gib"].values == [3.0]


def test_every_metric_has_a_name_of_its_own_that_prometheus_takes() -> None:
    metrics = [value for name, value in vars(names).items() if name.isupper()]
    found = [exported_name(metric) for metric in metrics]
    assert len(set(found)) == len(metrics) > 10
    assert all(re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) for name in found)
