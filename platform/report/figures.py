"""Figures as text for people."""

from __future__ import annotations


def number(value: float | None, digits: int) -> str:
    """A figure with so many significant digits, thousands grouped; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def with_unit(value: float | None, unit: str) -> str:
    """A figure and its unit; parts of a GiB in MiB; a dash for None."""
    if value is None:
        return "–"
    if unit == "GiB" and 0 < abs(value) < 1:
        return f"{number(value * 1024, 4)} MiB"
    return f"{number(value, 4)} {unit}"


def count_text(value: float) -> str:
    """A large count with a letter for its power of 1000."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"
