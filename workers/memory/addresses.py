"""One address for every request of a step for memory: offline dynamic storage allocation, on two levels. No torch.

Two requests that are alive at once must not overlap; the arena that holds them all should be small (MEMO, section on
bi-level planning, arXiv 2407.12117):

    level 1   the requests that begin and end inside one block's pass, by themselves; equal passes are solved once
    level 2   the step, with each of those groups as one request of the size of its arena, and the rest one by one

A group is a stretch of a pass in which some request of it is always alive. No arena is smaller than the most bytes that
are alive at once (`live_bytes`). Two levels are fast: 80 equal blocks cost one solution of a block. They lose where the
most bytes of a group and of the rest do not fall together; then a step of at most MOST_PLACED requests is also solved
on one level, and the smaller arena is taken.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGN_BYTES = 512
# Up to so many requests that overlap in time the program is exact; more of them take minutes.
MOST_PAIRS = 40
TIME_LIMIT_S = 1.0
CLOSE = 1.001  # an arena of so much over the live bytes is not made smaller
ROUNDS = 4  # of each order: the requests that reach the top are placed earlier in the next one
MOST_PLACED = 32_000  # requests that all rounds of a solution place

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Request:
    """Memory wanted from `begin` until before `end`, in any count that grows; a request of no time asks for nothing."""

    num_bytes: int
    begin: int
    end: int


@dataclass(frozen=True)
class Addresses:
    """Offsets of the requests in their arena, multiples of ALIGN_BYTES, and its size.

    Args:
        offsets: in the order of the requests, bytes.
    """

    offsets: tuple[int, ...]
    arena_bytes: int


def aligned(num_bytes: int) -> int:
    """The bytes that a request takes: rounded up to ALIGN_BYTES."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def live_bytes(requests: Sequence[Request]) -> int:
    """Most bytes, aligned, that are alive at once."""
    changes = defaultdict[int, int](int)
    for request in requests:
        changes[request.begin] += aligned(request.num_bytes)
        changes[request.end] -= aligned(request.num_bytes)
    now = peak = 0
    for time in sorted(changes):
        now += changes[time]
        peak = max(peak, now)
    return peak


def plan_addresses(requests: Sequence[Request], marks: Sequence[int] = ()) -> Addresses:
    """Addresses on two levels, or on one where that is better.

    Args:
        marks: times at which a block's pass begins, ascending; none: one level.
    """
    found = _on_two_levels(requests, marks)
    if not marks or found.arena_bytes <= CLOSE * live_bytes(requests) or len(requests) > MOST_PLACED:
        return found
    return min(found, solve(requests), key=lambda own: own.arena_bytes)


def solve(requests: Sequence[Request]) -> Addresses:
    """Addresses on one level: exact where few requests overlap, else the best of some orders."""
    bound = live_bytes(requests)
    sizes = np.array([aligned(request.num_bytes) for request in requests], dtype=np.int64)
    begins = np.array([request.begin for request in requests], dtype=np.int64)
    ends = np.array([request.end for request in requests], dtype=np.int64)
    best, most, num_left = np.zeros_like(sizes), int(sizes.sum()), max(1, MOST_PLACED // max(1, len(sizes)))
    for keys in (sizes, sizes * (ends - begins), ends - begins, -begins):
        order = np.lexsort((begins, -sizes, -keys))
        for _ in range(min(ROUNDS, num_left)):
            num_left -= 1
            offsets = _place(sizes, begins, ends, order)
            tops = offsets + sizes
            arena = int(tops.max(initial=0))
            if arena <= most:
                best, most = offsets, arena
            if most <= CLOSE * bound:
                return Addresses(tuple(best.tolist()), most)
            order = np.concatenate((order[tops[order] == arena], order[tops[order] < arena]))
    if (exact := _exact(sizes, begins, ends, bound, most)) is not None:
        best, most = exact, int((exact + sizes).max())
    return Addresses(tuple(best.tolist()), most)


def _on_two_levels(requests: Sequence[Request], marks: Sequence[int]) -> Addresses:
    groups, rest = _groups(requests, marks)
    offsets, boxes, solved = [0] * len(requests), list[Request](), dict[tuple[Request, ...], Addresses]()
    for group in groups:
        own = _from_zero([requests[number] for number in group])
        if own not in solved:
            solved[own] = solve(own)
        begin, end = requests[group[0]].begin, max(requests[number].end for number in group)
        boxes.append(Request(solved[own].arena_bytes, begin, end))
        for number, offset in zip(group, solved[own].offsets, strict=True):
            offsets[number] = offset
    step = solve(boxes + [requests[number] for number in rest])
    for group, base in zip(groups, step.offsets, strict=False):
        for number in group:
            offsets[number] += base
    for number, base in zip(rest, step.offsets[len(groups) :], strict=True):
        offsets[number] = base
    return Addresses(tuple(offsets), step.arena_bytes)


def _groups(requests: Sequence[Request], marks: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Numbers of the requests of each group in the order of their begin, and those of the requests in none."""
    groups, rest, ends = list[list[int]](), list[int](), dict[int, int]()
    for number in sorted(range(len(requests)), key=lambda number: requests[number].begin):
        request = requests[number]
        own = bisect_right(marks, request.begin)
        # Ends of a pass: the next mark. Before the first and after the last mark is no pass.
        if not 0 < own < len(marks) or request.end > marks[own]:
            rest.append(number)
        elif own in ends and request.begin < ends[own]:
            groups[-1].append(number)
            ends[own] = max(ends[own], request.end)
        else:
            groups.append([number])
            ends[own] = request.end
    return groups, rest


def _from_zero(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The same requests with times counted from 0 without gaps, so that equal groups compare equal."""
    times = sorted({time for request in requests for time in (request.begin, request.end)})
    rank = {time: number for number, time in enumerate(times)}
    return tuple(Request(request.num_bytes, rank[request.begin], rank[request.end]) for request in requests)


def _place(sizes: Numbers, begins: Numbers, ends: Numbers, order: Numbers) -> Numbers:
    """Offsets: each request, in this order, goes into the smallest gap between those placed before that holds it."""
    offsets, num = np.zeros_like(sizes), len(sizes)
    low, high, born, gone = (np.zeros(num, dtype=np.int64) for _ in range(4))
    for count, number in enumerate(order):
        there = (born[:count] < ends[number]) & (gone[:count] > begins[number])
        lows, highs = low[:count][there], high[:count][there]
        by_low = np.argsort(lows)
        starts = np.concatenate(([0], np.maximum.accumulate(highs[by_low])))
        gaps = np.append(lows[by_low], np.iinfo(np.int64).max) - starts
        gaps[gaps < sizes[number]] = np.iinfo(np.int64).max
        gaps[-1] = np.iinfo(np.int64).max  # above all of them, where no gap holds it
        best = int(gaps.argmin())
        offset = starts[best] if gaps[best] < np.iinfo(np.int64).max else starts[-1]
        offsets[number] = offset
        low[count], high[count] = offset, offset + sizes[number]
        born[count], gone[count] = begins[number], ends[number]
    return offsets


def _exact(sizes: Numbers, begins: Numbers, ends: Numbers, bound: int, most: int) -> Numbers | None:
    """The mixed-integer program (HiGHS); None: too many pairs, or nothing better than `most` was found in time.

    Variables: an offset for each request, which of each pair lies below the other, and the arena.
    """
    first, second = np.nonzero(np.triu((begins[:, None] < ends) & (ends[:, None] > begins), 1))
    if not 0 < len(first) <= MOST_PAIRS:
        return None
    from scipy.optimize import Bounds, LinearConstraint, milp

    unit, num, pairs = ALIGN_BYTES, len(sizes), len(first)
    own, top = sizes / unit, most / unit
    rows = np.zeros((num + 2 * pairs, num + pairs + 1))
    limits = np.concatenate((-own, -own[first], top - own[second]))
    rows[np.arange(num), np.arange(num)], rows[:num, -1] = 1, -1  # offset + size <= arena
    below, above = num + np.arange(pairs), num + pairs + np.arange(pairs)
    rows[below, first], rows[below, second], rows[below, below] = 1, -1, -top
    rows[above, second], rows[above, first], rows[above, below] = 1, -1, top
    lower, upper = np.zeros(num + pairs + 1), np.full(num + pairs + 1, top)
    upper[num:-1], lower[-1] = 1, bound / unit
    found = milp(
        np.eye(num + pairs + 1)[-1],
        integrality=np.concatenate((np.zeros(num), np.ones(pairs), [0])),
        bounds=Bounds(lower, upper),
        constraints=LinearConstraint(rows, ub=limits),
        options={"time_limit": TIME_LIMIT_S},
    )
    if found.x is None or found.x[-1] * unit >= most - unit / 2:
        return None
    # What lies below what is sure; the offsets follow from that in whole units.
    lies_below = np.where(found.x[num:-1] < 0.5, 1, 0)
    order = np.argsort(found.x[:num], kind="stable")
    offsets = np.zeros_like(sizes)
    for number in order:
        under = np.concatenate(
            (first[(second == number) & (lies_below == 1)], second[(first == number) & (lies_below == 0)])
        )
        offsets[number] = (offsets[under] + sizes[under]).max(initial=0)
    return offsets
