from __future__ import annotations

import pytest

from headrace.bench import addresses
from headrace.bench.addresses import MIB, first_fit, reserved
from headrace.storage.core.errors import InputError
from headrace.workers.memory.addresses import Request

OPTIONS = {**addresses.OPTIONS, "model": "tiny", "seq_len": 128, "presets": "recompute,chunk"}


def test_the_planned_arena_of_a_real_step_is_near_the_bytes_alive() -> None:
    rows = list(addresses.run(OPTIONS))
    assert [row.name for row in rows] == ["recompute", "chunk"]
    for row in rows:
        assert row.target is not None
        assert row.target.met, row
        assert row.numbers["num_requests"] > 100
        over = {name: row.numbers[f"{name}_over_live"] for name in ("planned", "first_fit", "caching", "expandable")}
        assert 1 <= over["planned"] <= min(over.values())


def test_the_rules_of_torchs_allocator() -> None:
    """By hand: segments of 2 MiB below 1 MiB, of 20 MiB below 10 MiB, else of whole 2 MiB; splitting; best fit."""
    small, large, huge = (Request(size, 0, 9) for size in (1000, 3 * MIB, 11 * MIB + 1))
    assert reserved([small], grows=False) == 2 * MIB
    assert reserved([large], grows=False) == reserved([large] * 6, grows=False) == 20 * MIB
    assert reserved([large] * 7, grows=False) == 40 * MIB
    assert reserved([huge], grows=False) == 12 * MIB
    assert reserved([small, large, huge], grows=True) == 2 * MIB + 20 * MIB
    # A segment of 12 MiB that is free cannot hold 14 MiB; one that grows needs another page only when it is full.
    later = Request(14 * MIB, 10, 11)
    assert reserved([huge, later], grows=False) == 26 * MIB
    assert reserved([huge, later], grows=True) == 20 * MIB
    # What is left over of a large segment is split off from 1 MiB on.
    assert reserved([Request(19 * MIB, 0, 9), Request(2 * MIB, 1, 9)], grows=False) == 40 * MIB


def test_first_fit_takes_the_lowest_gap_of_the_moment() -> None:
    # The gap of the first one is too small for the third, which a plan would have put there.
    rows = [Request(2 * 512, 0, 2), Request(512, 1, 6), Request(3 * 512, 3, 5)]
    assert first_fit(rows) == 6 * 512
    assert first_fit([rows[0], rows[1], Request(2 * 512, 3, 5)]) == 3 * 512


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="presets"):
        next(addresses.run({**OPTIONS, "presets": "kep"}))
