"""Plans of many lengths, and the longest length that fits. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import RATE_KEYS, to_json
from headrace.platform.planning.leanest import chunk_plan, lean_fits, leanest
from headrace.platform.planning.refuse import refused_answer
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan

# Rows beyond this are not asked for: where a tier has no limit, every length fits.
MOST_TOKENS = 1 << 28
UNIT = 1024


class Longest(NamedTuple):
    """The longest row that fits, as a request.

    Args:
        unit: the length is a multiple of it, and one unit more does not fit.
        is_bounded: whether a budget ends it; else it is MOST_TOKENS.
    """

    request: PlanRequest
    plan: MemoryPlan
    unit: int
    is_bounded: bool


def answer(request: PlanRequest) -> dict[str, Any]:
    """What explain.to_json says of the plan of a request, or of a refusal, with `seq_len`."""
    plan = find_plan(request)
    found = refused_answer(request) if plan is None else to_json(plan, request)
    return {"seq_len": request.seq_len, **found}


def has_plan(request: PlanRequest) -> bool:
    """Whether find_plan finds one; without the search for the best one."""
    if request.preset is not MemoryPreset.auto:
        return find_plan(request) is not None
    return lean_fits(leanest(request)) or chunk_plan(request) is not None


def longest(request: PlanRequest, unit: int = UNIT) -> Longest:
    """The longest row that fits, by bisection: a longer row wants more of every tier.

    Args:
        unit: in tokens; raised to a multiple of what the ranks of a row need.

    Raises:
        InputError: the unit is below 1 or too long, or not even one unit fits: the refusal of that length.
    """
    check_one_length(request, "--max-len")
    unit = math.lcm(max(1, unit), request.seq_len_step)

    def of(number: int) -> PlanRequest:
        return replace(request, seq_len=number * unit)

    low, most = 0, MOST_TOKENS // unit
    if most < 1:
        raise InputError(f"unit={unit}: at most {MOST_TOKENS} tokens are asked for; take a smaller unit")
    high = most + 1
    while low < most and high > most:
        probe = min(max(1, 2 * low), most)
        if has_plan(of(probe)):
            low = probe
        else:
            high = probe
    while high - low > 1:
        middle = (low + high) // 2
        if has_plan(of(middle)):
            low = middle
        else:
            high = middle
    found = of(max(1, low))
    return Longest(found, solve_plan(found), unit, is_bounded=low < most)


def check_one_length(request: PlanRequest, word: str) -> None:
    """Refuse a question about lengths where the run's rows cannot have another one.

    Raises:
        InputError: names the key.
    """
    if request.buckets:
        raise InputError(f"{word}: data.buckets={list(request.buckets)} states lengths; set data.buckets=[]")
    if "data.seq_len" in request.pinned:
        raise InputError(f"{word}: data.prepared has rows of one length; leave data.prepared out")


def lengths_between(first: int, last: int) -> list[int]:
    """`first`, doubled while below `last`, and `last`."""
    found = [first]
    while 2 * found[-1] < last:
        found.append(2 * found[-1])
    return found if last == first else [*found, last]


def sweep_table(answers: Iterable[dict[str, Any]]) -> str:
    """A line for each length, at most 120 columns."""
    unknown: dict[str, None] = {}
    lines = ["tokens      step s     MFU %   tokens/s   device GiB  host GiB    SSD GiB     exposed s  plan"]
    for found in answers:
        figures, plan = found["predicted"], found["plan"]
        what = "does not fit: " + ", ".join(found["binding"])
        if plan is not None:
            unknown |= dict.fromkeys(RATE_KEYS[name] for name in found["unknown_rates"])
            what = str(plan["sweep"]).replace("_", " ")
            what += f", more {' or '.join(found['binding'])} would help" if found["binding"] else ""
        names = ("step_s", "mfu_causal_pct", "tokens_per_s_per_gpu", "gpu_peak_gib", "host_peak_gib", "ssd_peak_gib")
        columns = zip((*names, "exposed_s"), (11, 8, 11, 12, 12, 12, 11), strict=True)
        cells = "".join(f"{short(figures[name]):<{width}}" for name, width in columns)
        lines.append(f"{found['seq_len']:<12}{cells}{what}"[:120])
    if unknown:
        lines += ["", "no step time where a plan needs a rate that is not known: " + ", ".join(unknown)]
    return "\n".join(lines)


def short(value: float | None) -> str:
    """A number in at most eight characters; - where there is none."""
    return "-" if value is None else f"{value:.4g}"
