"""The head that stays: a run joins it, its gauges stay on the metrics page, and --stop leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.soak]
GAUGE_EXPIRY_S = 30


def headrace(*words: str, **env: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "headrace.platform.cli.main", *words, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        timeout=600,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


NODES = """
import json
from headrace.platform.control.config import ClusterConfig
from headrace.platform.control.ray_session import ray_session
with ray_session(ClusterConfig()):
    import ray
    print(json.dumps([f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]))
"""


def metrics_pages(cache: str) -> str:
    """All that the metrics endpoints of the head's nodes export now."""
    env = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run([sys.executable, "-c", NODES], stdout=subprocess.PIPE, text=True, env=env, check=True)
    pages = ""
    for target in json.loads(done.stdout.splitlines()[-1]):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=120) as page:
            pages += page.read().decode()
    return pages


def job_names(url: str) -> list[str]:
    """The jobs on the dashboard, by name."""
    token = (Path.home() / ".ray" / "auth_token").read_text()
    ask = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(ask, timeout=120) as answer:
        return [job["metadata"].get("job_name") for job in json.loads(answer.read())]


@contextmanager
def monitor(cache: str) -> Iterator[dict]:
    """`headrace monitor`, until it is ended as by `kill`, and then its head; what it says."""
    words = [sys.executable, "-m", "headrace.platform.cli.main", "monitor", "--json"]
    env = {**os.environ, "XDG_CACHE_HOME": cache}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as watcher:
        try:
            assert watcher.stdout is not None
            yield json.loads(watcher.stdout.readline())
            watcher.terminate()
            assert watcher.wait(600) == 0
        finally:
            watcher.kill()
            assert headrace("dashboard", "--stop", XDG_CACHE_HOME=cache)["stopped"]


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed: apt-get install prometheus"
)
def test_monitor_finds_the_runs_of_the_head(job, drive, tmp_path: Path) -> None:
    """By Ray's service discovery, with the token."""
    cache = str(tmp_path / "cache")
    long = job(train={"steps": 100_000, "micro_batches": 20})
    with monitor(cache) as facts:
        query = f"{facts['prometheus']}/api/v1/query?query=ray_headrace_step"
        with drive(long, "ray", XDG_CACHE_HOME=cache):
            until_s = time.monotonic() + 600
            found: list[dict] = []
            while len(found) < 2 and time.monotonic() < until_s:
                time.sleep(1)
                with urllib.request.urlopen(query, timeout=120) as answer:
                    found = json.loads(answer.read())["data"]["result"]
            assert job_names(facts["cluster"]) == [Path(long.run_dir).name]
        assert {(row["metric"]["run"], row["metric"]["rank"]) for row in found} == {
            (Path(long.run_dir).name, rank) for rank in ("0", "1")
        }
        with urllib.request.urlopen(facts["page"], timeout=120) as page:
            assert page.status == 200
        boards = Path(facts["folder"]) / "grafana"
        assert len(list(boards.glob("*boards/*.json"))) > 3, "Ray's and ours"
    with pytest.raises(OSError):
        urllib.request.urlopen(query, timeout=2)


def test_a_run_joins_the_head_and_a_long_step_stays_on_the_board(job, drive, tmp_path: Path, sockets) -> None:
    cache = str(tmp_path / "cache")
    head = headrace("dashboard", XDG_CACHE_HOME=cache)
    try:
        assert headrace("dashboard", XDG_CACHE_HOME=cache)["address"] == head["address"]  # a second call finds it
        long = job(train={"steps": 100_000, "micro_batches": 400})
        with drive(long, "ray", XDG_CACHE_HOME=cache) as driver:
            time.sleep(GAUGE_EXPIRY_S + 15)
            pages = metrics_pages(cache)
            kept = json.loads((tmp_path / "cache" / "headrace" / "ray_head.json").read_text())
            tree = sockets.descendants(kept["process"]["pid"]) + sockets.descendants(driver.pid)
            assert len(sockets.listeners(tree)) >= 10
            assert sockets.open_to_others(tree) == []
            rows = [line for line in pages.splitlines() if line.startswith("ray_headrace_loss_train{")]
            assert {f'rank="{rank}"' for rank in (0, 1)} <= {part for row in rows for part in row.split(",")}
            assert all(f'run="{Path(long.run_dir).name}"' in row for row in rows)
            driver.terminate()
            rest = driver.stdout.read()
            assert driver.wait(600) == 3, rest
    finally:
        assert headrace("dashboard", "--stop", XDG_CACHE_HOME=cache)["stopped"]
    with pytest.raises(OSError):
        urllib.request.urlopen(head["dashboard_url"], timeout=2)
