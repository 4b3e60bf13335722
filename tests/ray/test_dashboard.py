"""The head that stays: a run joins it, its gauges stay on the metrics page, and --stop leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
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
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
            pages += page.read().decode()
    return pages


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
