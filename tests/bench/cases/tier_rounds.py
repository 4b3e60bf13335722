"""Passes of bytes, ours and the machine's in turns, and what is said of them.

Drives and hosts are throttled in bursts: the same pass may take four times as long a minute later. So the two sides
never run apart. The machine's pass comes first and last and between any two of ours,

    machine  ours  machine  ours  machine ...

and a pass of ours is compared with the geometric mean of its two neighbours. Rates that change by a steady factor from
pass to pass cancel in it exactly, and a ratio counts as much below 1 as its inverse above, so that noise favours
neither side. The figure of a case is the median of these ratios over its rounds, with the smallest and the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from statistics import median

from headrace.bench.tier_sigterm import end_if_told

GIB = 1024**3


@dataclass(frozen=True)
class Pass:
    """Bytes that were moved once.

    Args:
        cpu_s: user and system time of all threads of the process that moved them; None where it is not known.
    """

    num_bytes: int
    wall_s: float
    cpu_s: float | None = None

    @property
    def gbps(self) -> float:
        """GB/s (1e9 bytes)."""
        return self.num_bytes / self.wall_s / 1e9

    @property
    def cpu_s_per_gib(self) -> float | None:
        """Processor seconds per GiB."""
        return None if self.cpu_s is None else self.cpu_s * GIB / self.num_bytes


@dataclass(frozen=True)
class Series:
    """The passes of one of our variants, and how each compares with the machine's passes around it.

    Args:
        ratios: one per pass; empty where the machine's side could not be measured.
    """

    passes: list[Pass]
    ratios: list[float]

    @property
    def gbps(self) -> float:
        """Median over the rounds."""
        return median(one.gbps for one in self.passes)

    @property
    def ratio(self) -> float | None:
        """Median over the rounds; None without the machine's side."""
        return median(self.ratios) if self.ratios else None


def take_turns(
    ours: Mapping[str, tuple[Callable[[], Pass], int]], machine: Callable[[], Pass] | None
) -> tuple[dict[str, Series], list[Pass]]:
    """Run our variants and the machine's side in turns.

    Args:
        ours: by name, the pass and its number of rounds (at least 1); variants alternate too.
        machine: None where it cannot be measured; then there are no ratios.

    Returns:
        A series per variant, and the machine's passes in order.

    Raises:
        SystemExit: a SIGTERM came; see tier_sigterm.py.
    """
    most = max(rounds for _, rounds in ours.values())
    turns = [name for number in range(most) for name, (_, rounds) in ours.items() if number < rounds]
    found: list[Pass] = []
    around: list[Pass] = []
    if machine is not None:
        around.append(machine())
    for name in turns:
        end_if_told()
        found.append(ours[name][0]())
        if machine is not None:
            around.append(machine())
    ratios = neighbour_ratios([one.gbps for one in found], [one.gbps for one in around])
    series = {}
    for name in ours:
        mine = [index for index, turn in enumerate(turns) if turn == name]
        series[name] = Series([found[i] for i in mine], [ratios[i] for i in mine] if ratios else [])
    return series, around


def neighbour_ratios(ours: list[float], around: list[float]) -> list[float]:
    """Each rate over the geometric mean of the rates before and after it; nothing where there are none around.

    Raises:
        ValueError: `around` is neither empty nor one longer than `ours`.
    """
    if not around:
        return []
    if len(around) != len(ours) + 1:
        raise ValueError(f"{len(ours)} passes want {len(ours) + 1} around them, not {len(around)}")
    return [rate / sqrt(before * after) for rate, (before, after) in zip(ours, pairwise(around), strict=True)]


def numbers(series: Series, machine: list[Pass]) -> dict[str, float | int | None]:
    """The columns of a row: medians, the spread of the ratio, and processor time per GiB of both sides."""
    return {
        "ours_gbps": series.gbps,
        "machine_gbps": median(one.gbps for one in machine) if machine else None,
        "ratio": series.ratio,
        "ratio_min": min(series.ratios, default=None),
        "ratio_max": max(series.ratios, default=None),
        "rounds": len(series.passes),
        "ours_cpu_s_per_gib": _median_cpu(series.passes),
        "machine_cpu_s_per_gib": _median_cpu(machine),
    }


def _median_cpu(passes: list[Pass]) -> float | None:
    known = [one.cpu_s_per_gib for one in passes if one.cpu_s_per_gib is not None]
    return median(known) if known else None
