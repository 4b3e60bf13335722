"""Units of metrics, by the end of their names. No torch."""

from __future__ import annotations

UNITS = {
    "_gbps": "GB/s: gigabytes (1e9 bytes) a second, not bits",
    "_gib": "GiB: 2^30 bytes",
    "_tb": "TB: 1e12 bytes",
    "_pct": "percent",
    "_s": "seconds",
}


def unit_of(name: str) -> str:
    """The unit of a metric, with what it means; empty for counts, shares and losses."""
    return next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), "")
