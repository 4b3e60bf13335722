"""Names under which metrics stand in Ray's exporter and in Prometheus: the one list of them. No torch, no Ray."""

from __future__ import annotations

import re

from headrace.workers.telemetry import names
from headrace.workers.telemetry.units import unit_of

# Ray puts it before the name of every metric.
RAY_PREFIX = "ray_"
# Of one rank: optimizer steps that are done, and, before a metric's name, what the plan expects of it.
STEP, PREDICTED = "step", "predicted/"
# Counter of a run's events, by `kind` and `cause`; the exporter adds `_total`.
EVENTS = "events"


def exported_name(metric: str) -> str:
    """A metric's name as Prometheus allows it, without Ray's prefix: `perf/step_s` becomes `headrace_perf_step_s`."""
    return "headrace_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def series(metric: str) -> str:
    """The name of a metric in a query."""
    return RAY_PREFIX + exported_name(metric)


def help_text(metric: str) -> str:
    """What the exporter says about a metric: our name of it, and its unit."""
    return f"headrace {metric} {unit_of(metric)}".strip()


EVENTS_SERIES = f"{series(EVENTS)}_total"


def all_series() -> dict[str, str]:
    """Every series of ours that Prometheus can have, with its help text."""
    metrics = [value for name, value in vars(names).items() if name.isupper()]
    every = [STEP, *metrics, *(PREDICTED + metric for metric in metrics)]
    return {series(metric): help_text(metric) for metric in every} | {EVENTS_SERIES: help_text(EVENTS)}
