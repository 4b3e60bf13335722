"""A real Prometheus on a tiny run that a slow drive, steps that are not finite and a killed rank trouble.

Every query of the board and of the alerts must return data, and the three troubles must raise their alerts in time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from headrace.helpers.training import plan_for, tiny_job
from headrace.platform.cli.monitor import prometheus
from headrace.platform.control import controller
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.event_counter import EventCounter
from headrace.platform.control.launch import launch
from headrace.platform.monitor.alerts import ALERTS, alert_rules
from headrace.platform.monitor.board import PANELS
from headrace.platform.monitor.files import prometheus_config
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.outside import parse_json
from headrace.storage.core.ports import free_port
from headrace.workers.memory.plan import LayerPlan, Residence
from headrace.workers.telemetry import names
from headrace.workers.telemetry.exported import RAY_PREFIX, all_series
from headrace.workers.telemetry.records import RankEvent
from headrace.workers.train.config import NonFinite

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
    ),
]
SCRAPE_S, EVALUATE_S = 3.0, 1.0
TROUBLES = {"RankLost": "group_restarted", "NotFinite": "step_skipped", "SlowTier": "tier_drift"}
# Events that no short test brings about; they take the same way to Prometheus.
STAGED = ("rank_hung", "waiting_for_nodes", "run_failed", "checkpoint_failed", "owner_lost", "endurance_low")
LIMIT_S = 90.0


class Prometheus:
    """What one Prometheus knows."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer of its API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=120) as answer:
            return parse_json(answer.read())["data"]

    def value(self, query: str) -> list[Any]:
        """The series that a query returns now."""
        return self.get("query", query=query)["result"]


@pytest.fixture
def watcher(ray_cluster, tmp_path: Path) -> Iterator[Prometheus]:
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    config = prometheus_config({"static_configs": [{"targets": targets}]}, scrape_s=SCRAPE_S)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(alert_rules(evaluate_s=EVALUATE_S)))
    url = f"http://127.0.0.1:{free_port()}"
    with prometheus(tmp_path, url):
        yield Prometheus(url)


class Watch(threading.Thread):
    """Notes when each alert fires, and which queries have not returned data yet."""

    def __init__(self, watcher: Prometheus) -> None:
        super().__init__(daemon=True)
        self._watcher = watcher
        self.missing = {query.replace("$run", ".*") for panel in PANELS for query in panel.queries.values()}
        self.missing |= {alert.measure for alert in ALERTS}
        self.fired: dict[str, float] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until the run has ended."""
        while not self.ended.wait(0.2):
            for alert in self._watcher.value('ALERTS{alertstate="firing"}'):
                name = alert["metric"]["alertname"].removeprefix("Headrace")
                self.fired.setdefault(f"{name} {alert['metric'].get('run')}", time.time())
            self.missing -= {query for query in self.missing if self._watcher.value(query)}


@pytest.fixture
def troubled_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Runs a job whose drive is slower than its profile, whose weights explode, and one of whose ranks is killed.

    Returns when each kind of event was told first. It ends when the watch has seen everything, or after LIMIT_S.
    """
    monkeypatch.setattr(controller, "POLL_S", 0.1)

    def run(watch: Watch, name: str) -> dict[str, float]:
        told: dict[str, float] = {}
        until_s = time.monotonic() + LIMIT_S

        class Recorder:
            pids: tuple[int, ...] = ()

            def on_report(self, report) -> None:
                for event in report.events:
                    told.setdefault(event.kind, time.time())
                if report.step == 2 and self.pids:
                    os.kill(self.pids[1], signal.SIGKILL)
                    self.pids = ()
                seen = {f"{alert} {name}" for alert in TROUBLES} <= watch.fired.keys() and not watch.missing
                if (seen or not watch.is_alive() or time.monotonic() > until_s) and "stop_requested" not in told:
                    told["stop_requested"] = time.time()
                    signal.raise_signal(signal.SIGTERM)

            def on_event(self, event) -> None:
                if event.kind == "group_started" and event.kind not in told:
                    self.pids = tuple(rank["pid"] for rank in event.facts["ranks"])
                told.setdefault(event.kind, time.time())

            def on_stage(self, text) -> None: ...
            def on_part(self, text) -> None: ...
            def on_plan(self, record) -> None: ...

        ssd, host = Residence.ssd, Residence.host
        rows = [LayerPlan.of(x=host, q=host)] + 2 * [LayerPlan.of(**dict.fromkeys(("x", "q", "gate", "up"), ssd))]
        job = tiny_job(
            folder,
            run=name,
            model={"intermediate_size": 256},
            optim={"lr": 1e30, "warmup_steps": 0},
            train={"steps": 10_000, "batch_size": 128, "micro_batches": 4, "non_finite": NonFinite.skip}
            | {"max_skipped_steps": 10_000},
            checkpoint={"every": 2, "keep": 1},
        )
        tiers = replace(job.tiers, ssd=replace(job.tiers.ssd, endurance=EnduranceConfig(rated_tbw=600.0)))
        fast = {names.SSD_WRITE_GBPS: 1e3, names.SSD_READ_GBPS: 1e3, names.STEP_S: 1.0}
        fast |= dict.fromkeys((names.GPU_PEAK_GIB, names.HOST_PEAK_GIB, names.SSD_PEAK_GIB), 1.0)
        plan = replace(plan_for("offload_ssd", job.model), layers=tuple(rows), predicted=fast)
        launch(
            replace(job, plan=plan, tiers=tiers),
            ClusterConfig(num_workers=2, dashboard=False),
            Recorder(),
            host_bytes=128 << 20,
            ssd_bytes=256 << 20,
            ssd_folders=[folder / "tiers"],
        )
        return told

    return run


def test_every_query_has_data_and_troubles_raise_their_alerts(watcher: Prometheus, folder, troubled_run) -> None:
    name = f"monitored-{os.getpid()}"
    staged = EventCounter(_Nothing(), "staged")
    for kind in STAGED:
        staged.on_event(RankEvent(kind, ""))
    staged.on_event(RankEvent("group_restarted", "", {"kind": "lost"}))
    watch = Watch(watcher)
    watch.start()
    told = troubled_run(watch, name)
    watch.ended.set()
    watch.join()
    print(json.dumps({alert: watch.fired.get(f"{alert} {name}", 0) - told[kind] for alert, kind in TROUBLES.items()}))
    assert watch.missing == set()
    for alert, kind in TROUBLES.items():
        assert watch.fired[f"{alert} {name}"] - told[kind] <= 2 * SCRAPE_S, alert
    assert f"RankHung {name}" not in watch.fired
    assert {"RankHung staged", "WaitingForNodes staged"} <= watch.fired.keys()
    shown = [path.read_text() for path in Path(logs_of_ray()).glob("worker-*.err")]
    assert sum(f"{name} rank {rank}: the whole log is" in text for text in shown for rank in (0, 1)) == 4
    assert any(f"{name} rank 1" in text and " step 1  loss" in text for text in shown)
    known = all_series()
    found = {each for each in watcher.get("label/__name__/values") if each.startswith(f"{RAY_PREFIX}headrace_")}
    assert found <= known.keys()
    helped = watcher.get("metadata")
    for each in found:
        told_help = {entry["help"] for entry in helped.get(each, [])}
        assert told_help <= {known[each]}


def logs_of_ray() -> str:
    """What the pages of actors show comes from here."""
    return ray._private.worker._global_node.get_logs_dir_path()


class _Nothing:
    """A recorder that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None
