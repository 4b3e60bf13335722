"""The board: what Grafana shows of the runs on a cluster. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.workers.telemetry import names
from headrace.workers.telemetry.exported import EVENTS_SERIES, PREDICTED, STEP, series

UID, TITLE = "headrace", "headrace: training runs"
SOURCE_UID = "headrace-prometheus"
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 8, 8, 3
# Grafana's names of units, by the end of a metric's name.
UNITS = {"_gbps": "GBs", "_gib": "gbytes", "_pct": "percent", "_days_left": "d", "_s": "s"}
CHOSEN = '{run=~"$run"}'


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        queries: legend to query; `$run` is the chosen run. In a legend `{{label}}` is filled in.
        unit: Grafana's name of it.
    """

    title: str
    queries: Mapping[str, str]
    unit: str = "none"


def of_ranks(title: str, **metrics: str) -> Panel:
    """A picture with a line for each rank and metric.

    Args:
        metrics: word of the legend to metric; all have one unit.
    """
    queries = {
        f"{word.replace('_', ' ')} rank {{{{rank}}}}": f"{series(metric)}{CHOSEN}" for word, metric in metrics.items()
    }
    return Panel(title, queries, unit_of(next(iter(metrics.values()))))


def of_run(title: str, how: str, **metrics: str) -> Panel:
    """A picture with a line for each run and metric.

    Args:
        how: Prometheus' operator over the ranks, as `max`.
    """
    queries = {
        f"{word.replace('_', ' ')} {{{{run}}}}": f"{how} by (run) ({series(metric)}{CHOSEN})"
        for word, metric in metrics.items()
    }
    return Panel(title, queries, unit_of(next(iter(metrics.values()))))


def of_tensors(title: str, metric: str) -> Panel:
    """A picture with a line for each tensor, of the rank that has the most of it."""
    query = f"max by (tensor) ({series(metric)}{CHOSEN})"
    return Panel(title, {"{{tensor}}": query}, unit_of(metric))


def unit_of(metric: str) -> str:
    """Grafana's unit of a metric."""
    return next((unit for suffix, unit in UNITS.items() if metric.endswith(suffix)), "none")


PANELS = (
    Panel("Alerts", {"{{alertname}} {{run}}": 'ALERTS{alertname=~"Headrace.*"}'}),
    Panel("Events", {"{{kind}} {{cause}}": f"sum by (kind, cause) ({EVENTS_SERIES}{CHOSEN})"}),
    of_run("Step", "min", step=STEP),
    of_run("Loss", "max", loss=names.LOSS_TRAIN),
    of_run("Gradient norm", "max", norm=names.GRAD_NORM),
    of_ranks("Tokens a second and GPU", tokens=names.TOKENS_PER_S_PER_GPU),
    of_run(
        "Utilisation: three formulas, never to be compared with each other",
        "avg",
        MFU_causal=names.MFU_CAUSAL_PCT,
        MFU_full_attention=names.MFU_FULL_ATTENTION_PCT,
        HFU=names.HFU_PCT,
    ),
    of_run(
        "Step time, predicted and measured",
        "max",
        measured=names.STEP_S,
        predicted=PREDICTED + names.STEP_S,
        of_it_waiting_for_rows=names.DATA_WAIT_S,
    ),
    of_ranks("Exposed transfer, share of the step", exposed=names.EXPOSED_PCT),
    of_ranks(
        "Memory by tier, peak of the step", device=names.GPU_PEAK_GIB, host=names.HOST_PEAK_GIB, ssd=names.SSD_PEAK_GIB
    ),
    of_run(
        "Memory by tier, predicted",
        "max",
        device=PREDICTED + names.GPU_PEAK_GIB,
        host=PREDICTED + names.HOST_PEAK_GIB,
        ssd=PREDICTED + names.SSD_PEAK_GIB,
    ),
    of_tensors("Host tier by tensor, peak of the step", names.HOST_TENSOR_GIB),
    of_tensors("SSD tier by tensor, peak of the step", names.SSD_TENSOR_GIB),
    of_ranks("Plan errors: measured against predicted", step=names.STEP_ERROR_PCT, peak=names.GPU_PEAK_ERROR_PCT),
    of_ranks("Link rates while moving, host", to=names.D2H_GBPS, back=names.H2D_GBPS),
    of_ranks("Link rates while moving, drive", written=names.SSD_WRITE_GBPS, read=names.SSD_READ_GBPS),
    of_ranks(
        "Rates against the profile (negative is slower)",
        drive_write=names.SSD_WRITE_DRIFT_PCT,
        drive_read=names.SSD_READ_DRIFT_PCT,
    ),
    of_ranks("Checkpoint: seconds in which the step waited", checkpoint=names.CHECKPOINT_S),
    of_run("Drive: life and budget used", "max", life=names.SSD_LIFE_USED_PCT, budget=names.SSD_BUDGET_USED_PCT),
    of_run("Drive: days left at this rate", "min", days=names.SSD_DAYS_LEFT),
    Panel("Node memory used", {"{{ip}}": "100 * ray_node_mem_used / ray_node_mem_total"}, "percent"),
    Panel("Node CPUs used", {"{{ip}}": "ray_node_cpu_utilization"}, "percent"),
    Panel(
        "Node disk used", {"{{ip}}": "ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)"}, "percentunit"
    ),
)


def grafana_board() -> dict[str, Any]:
    """The board as Grafana reads it from a file."""
    return {
        "uid": UID,
        "title": TITLE,
        "tags": ["headrace"],
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_run_variable()]},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": SOURCE_UID}


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _source(),
        "query": {"query": f"label_values({EVENTS_SERIES}, run)", "refId": "run"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "title": panel.title,
        "type": "timeseries",
        "datasource": _source(),
        "gridPos": {
            "x": column * PANEL_WIDTH,
            "y": row * PANEL_HEIGHT,
            "w": PANEL_WIDTH,
            "h": PANEL_HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": _source(), "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }
