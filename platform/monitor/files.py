"""The files by which Prometheus finds a cluster's metrics and our alerts, and Grafana our board. No torch, no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.platform.monitor.alerts import alert_rules
from headrace.platform.monitor.board import SOURCE_UID, grafana_board
from headrace.platform.tracking.run_folder import write_text

# A process of a cluster of ours sends its metrics every 2 s: with these, an event raises its alert within two scrapes.
SCRAPE_S, EVALUATE_S = 5.0, 2.0
DISCOVERY_PATH = "/api/prometheus/sd"
# Below the folder of the files; Ray writes there.
RAY_BOARDS_FOLDER = "grafana/ray_boards"


@dataclass(frozen=True)
class Addresses:
    """URLs without a slash at their end.

    Args:
        cluster: Ray's dashboard. prometheus / grafana: where each of them is, or will be.
    """

    cluster: str
    prometheus: str
    grafana: str


def write_monitor_files(folder: Path, addresses: Addresses, token: Path | str | None) -> None:
    """Write prometheus.yml, alerts.yml and the folder grafana/.

    Args:
        folder: made where it is not there, for its owner alone.
        token: of the cluster: its file, or the token itself, which is then kept in the folder; None where it has none.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if isinstance(token, str):
        path = folder / "ray_token"
        path.touch(mode=0o600)
        path.write_text(token)
        token = path
    discovery: dict[str, Any] = {"url": addresses.cluster + DISCOVERY_PATH, "refresh_interval": f"{SCRAPE_S:g}s"}
    if token is not None:
        discovery["authorization"] = {"type": "Bearer", "credentials_file": str(token)}
    _write(folder / "prometheus.yml", prometheus_config({"http_sd_configs": [discovery]}))
    _write(folder / "alerts.yml", alert_rules(evaluate_s=EVALUATE_S))
    _write_grafana(folder / "grafana", addresses)


def prometheus_config(discovery: Mapping[str, Any], *, scrape_s: float = SCRAPE_S) -> dict[str, Any]:
    """The configuration of a Prometheus; its rules are in alerts.yml beside it.

    Args:
        discovery: how it finds the metrics pages of Ray's nodes, as its configuration says it.
    """
    interval = f"{scrape_s:g}s"
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "ray", **discovery}],
    }


def _write_grafana(folder: Path, addresses: Addresses) -> None:
    boards, ray_boards = folder / "boards", folder / Path(RAY_BOARDS_FOLDER).name
    provisioning = folder / "provisioning"
    for each in (boards, ray_boards, provisioning / "datasources", provisioning / "dashboards"):
        each.mkdir(parents=True, exist_ok=True)
    write_text(boards / "headrace.json", json.dumps(grafana_board(), indent=1) + "\n")
    source = {
        "name": "Prometheus",  # as the boards of Ray call it
        "uid": SOURCE_UID,
        "type": "prometheus",
        "url": addresses.prometheus,
        "access": "proxy",
        "isDefault": True,
        "jsonData": {"manageAlerts": True, "timeInterval": f"{SCRAPE_S:g}s"},
    }
    _write(provisioning / "datasources/headrace.yml", {"apiVersion": 1, "datasources": [source]})
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(path)}}
        for name, path in (("headrace", boards), ("Ray", ray_boards))
    ]
    _write(provisioning / "dashboards/headrace.yml", {"apiVersion": 1, "providers": providers})
    host, _, port = addresses.grafana.partition("//")[2].rpartition(":")
    # Ray's dashboard shows its panels in frames, which have no login.
    write_text(
        folder / "grafana.ini",
        f"[server]\nhttp_addr = {host}\nhttp_port = {port}\n[paths]\nprovisioning = {provisioning}\n"
        f"data = {folder / 'data'}\nlogs = {folder / 'logs'}\n[security]\nallow_embedding = true\n"
        "[auth.anonymous]\nenabled = true\norg_role = Viewer\n[analytics]\nreporting_enabled = false\n"
        "check_for_updates = false\n",
    )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    import yaml

    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, width=120))
