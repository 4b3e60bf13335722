"""The board, the alerts and the files. That their queries return data is shown in tests/ray/test_monitor.py."""

from __future__ import annotations

import ast
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from headrace.platform.monitor.alerts import ALERTS
from headrace.platform.monitor.board import COLUMNS, PANELS, grafana_board
from headrace.platform.monitor.files import Addresses, write_monitor_files
from headrace.storage.core.errors import ErrorId
from headrace.storage.core.outside import parse_json
from headrace.workers.telemetry.exported import all_series

ROOT = Path(__file__).resolve().parents[4]
SERIES = re.compile(r"ray_headrace_\w+")
ADDRESSES = Addresses("http://127.0.0.1:8265", "http://127.0.0.1:9090", "http://127.0.0.1:3000")


def test_board_and_alerts_ask_for_series_that_exist() -> None:
    queries = [query for panel in PANELS for query in panel.queries.values()]
    asked = {name for query in (*queries, *(alert.measure for alert in ALERTS)) for name in SERIES.findall(query)}
    assert len(asked) > 20
    assert asked <= all_series().keys()


def test_kinds_and_causes_of_alerts_are_those_of_the_code() -> None:
    """A word that no event has would be an alert that never fires."""
    sources = [path for folder in ("platform/control", "workers") for path in (ROOT / folder).rglob("*.py")]
    strings = {
        node.value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    words = {
        (label, word)
        for alert in ALERTS
        for label, found in re.findall(r'(kind|cause)=~"([a-z_|]+)"', alert.measure)
        for word in found.split("|")
    }
    assert len(words) > 10
    known = strings | {each.value for each in ErrorId}
    assert {word for _, word in words} <= known


def test_panels_of_the_board_do_not_overlap() -> None:
    board = grafana_board()
    places = [panel["gridPos"] for panel in board["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(PANELS)
    assert max(place["x"] + place["w"] for place in places) == COLUMNS * places[0]["w"] == 24
    assert len({panel["title"] for panel in board["panels"]}) == len(PANELS)


def test_files_name_the_cluster_its_token_and_the_board(tmp_path: Path) -> None:
    folder = tmp_path / "monitor"
    write_monitor_files(folder, ADDRESSES, "secret")
    scrape = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]
    token = folder / "ray_token"
    assert scrape["http_sd_configs"] == [
        {
            "url": "http://127.0.0.1:8265/api/prometheus/sd",
            "refresh_interval": "5s",
            "authorization": {"type": "Bearer", "credentials_file": str(token)},
        }
    ]
    assert token.read_text() == "secret"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    providers = yaml.safe_load((folder / "grafana/provisioning/dashboards/headrace.yml").read_text())["providers"]
    assert all(Path(each["options"]["path"]).is_dir() for each in providers)
    board = parse_json((folder / "grafana/boards/headrace.json").read_bytes())
    source = yaml.safe_load((folder / "grafana/provisioning/datasources/headrace.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"] == ADDRESSES.prometheus
    assert "http_port = 3000" in (folder / "grafana/grafana.ini").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt-get install prometheus")
def test_prometheus_takes_the_files(tmp_path: Path) -> None:
    write_monitor_files(tmp_path / "monitor", ADDRESSES, None)
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "monitor/prometheus.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
