from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.workers.memory import addresses
from headrace.workers.memory.addresses import (
    ALIGN_BYTES,
    Addresses,
    Request,
    aligned,
    live_bytes,
    plan_addresses,
    solve,
)

# (blocks of 512 bytes, begin, end): every order leaves a gap, and no two requests need one.
TIGHT = [
    [(1, 4, 8), (4, 4, 7), (3, 6, 8), (2, 5, 7), (2, 6, 8), (4, 4, 6), (3, 4, 7)],
    [(5, 6, 10), (4, 2, 6), (2, 4, 5), (5, 8, 10), (5, 1, 6), (5, 1, 2), (3, 1, 5)],
]
spans = st.tuples(st.integers(1, 9 * ALIGN_BYTES), st.integers(0, 30), st.integers(1, 12))


def requests_of(rows: Sequence[tuple[int, int, int]]) -> list[Request]:
    return [Request(num_bytes, begin, begin + length) for num_bytes, begin, length in rows]


def check(requests: Sequence[Request], found: Addresses) -> None:
    """Every request lies in the arena at an aligned address, beside all that live with it."""
    ends = [offset + aligned(own.num_bytes) for offset, own in zip(found.offsets, requests, strict=True)]
    assert all(offset >= 0 and offset % ALIGN_BYTES == 0 for offset in found.offsets)
    assert max(ends, default=0) <= found.arena_bytes
    assert found.arena_bytes >= live_bytes(requests)
    for one, own in enumerate(requests):
        for two in range(one):
            if own.begin < requests[two].end and requests[two].begin < own.end:
                assert ends[one] <= found.offsets[two] or ends[two] <= found.offsets[one], (one, two)


def brute_force(requests: Sequence[Request]) -> int:
    """The least arena: in some order each request lies right above the highest of those it lives with."""
    arenas = []
    for order in permutations(range(len(requests))):
        tops: dict[int, int] = {}
        for number in order:
            own = requests[number]
            under = [
                top for two, top in tops.items() if own.begin < requests[two].end and requests[two].begin < own.end
            ]
            tops[number] = max(under, default=0) + aligned(own.num_bytes)
        arenas.append(max(tops.values()))
    return min(arenas)


@settings(deadline=None, max_examples=60)
@given(st.lists(spans, max_size=40), st.lists(st.integers(0, 42), max_size=6, unique=True))
def test_nothing_that_lives_at_once_overlaps(rows: list[tuple[int, int, int]], marks: list[int]) -> None:
    requests = requests_of(rows)
    check(requests, plan_addresses(requests, sorted(marks)))


@settings(deadline=None, max_examples=15)
@given(st.lists(spans, min_size=1, max_size=6))
def test_small_problems_are_exact(rows: list[tuple[int, int, int]]) -> None:
    requests = requests_of(rows)
    assert solve(requests).arena_bytes == brute_force(requests)


@pytest.mark.parametrize("rows", TIGHT)
def test_the_program_closes_the_gap_that_every_order_leaves(
    rows: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(size * ALIGN_BYTES, begin, end) for size, begin, end in rows]
    found = solve(requests)
    check(requests, found)
    assert found.arena_bytes == live_bytes(requests)
    monkeypatch.setattr(addresses, "_exact", lambda *args: None)
    assert solve(requests).arena_bytes > live_bytes(requests)


def test_equal_blocks_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 blocks that hold a tensor each from forward to backward: a solution of each kind of pass, and of the step."""
    requests, marks, time = list[Request](), list[int](), 0
    born: list[int] = []
    for number in range(160):
        marks.append(time)
        if number < 80:
            born.append(time)
        else:
            requests.append(Request(3000 * ALIGN_BYTES, born.pop(), time + 30))
        sizes = [(7 * step + number // 80) % 13 + 1 for step in range(20)]
        requests += [
            Request(100 * size * ALIGN_BYTES, time + n, time + n + 1 + n % 4) for n, size in enumerate(sizes, 1)
        ]
        time += 30
    solved: list[int] = []
    plain = solve

    def counted(own: Sequence[Request]) -> Addresses:
        solved.append(len(own))
        return plain(own)

    monkeypatch.setattr(addresses, "solve", counted)
    found = plan_addresses(requests, [*marks, time])
    assert found.arena_bytes <= 1.01 * live_bytes(requests)
    assert len(solved) <= 6
    assert max(solved) < len(requests) / 4
