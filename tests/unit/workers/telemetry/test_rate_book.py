from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.workers.telemetry.rate_book import RateBook

QUIET, BUSY = 0.0, 1e6


@pytest.fixture
def book(tmp_path: Path) -> Callable[[float], RateBook]:
    return lambda load: RateBook(tmp_path / "cache" / "rates.json", load=lambda: load)


def counting(*values: float | None):
    taken = iter(values)
    return lambda: [next(taken)]


def test_a_rate_is_measured_once_whatever_the_load_is_later(book) -> None:
    measure = counting(3.0, 4.0)
    assert book(QUIET).rates("gemm", measure) == (3.0,)
    for load in (QUIET, BUSY):
        assert book(load).rates("gemm", measure) == (3.0,)
    assert book(QUIET).rates("other", measure) == (4.0,)


def test_what_was_measured_on_a_busy_machine_stands_until_it_is_quiet(book) -> None:
    measure = counting(1.0, 3.0)
    assert [book(load).rates("gemm", measure) for load in (BUSY, BUSY, QUIET, BUSY)] == [(1.0,), (1.0,), (3.0,), (3.0,)]


def test_it_forgets_when_told_to(book) -> None:
    measure = counting(1.0, 2.0)
    book(QUIET).rates("gemm", measure)
    one = book(QUIET)
    one.forget()
    one.forget()
    assert one.rates("gemm", measure) == (2.0,)


def test_it_says_when_and_under_which_load(book) -> None:
    quiet, busy = book(QUIET), book(BUSY)
    assert quiet.note() == ""
    quiet.rates("gemm", counting(1.0))
    assert " at a load of 0.0 on " in quiet.note()
    assert "too low" not in quiet.note()
    busy.rates("gemm", counting())
    busy.rates("copy", counting(1.0))
    assert "at a load of 1000000.0" in busy.note()
    assert "too low" in busy.note()
    kept = json.loads(quiet.path.read_text())["copy"]
    assert (kept["load"], kept["cores"], kept["measured"][:2]) == (BUSY, quiet.cores, "20")


def test_a_busy_machine_is_warned_of(book) -> None:
    assert book(QUIET).warning() is None
    assert "the load average is 1000000.0 on" in book(BUSY).warning()


def test_what_could_not_be_measured_is_tried_again(book) -> None:
    measure = counting(None, 2.0)
    assert [book(QUIET).rates("drive", measure) for _ in range(2)] == [(None,), (2.0,)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gemm": {"rates": [1.0]}}', '{"gemm": 3}'])
def test_a_damaged_book_is_written_anew(book, text: str) -> None:
    path = book(QUIET).path
    path.parent.mkdir()
    path.write_text(text)
    assert book(QUIET).rates("gemm", counting(5.0)) == (5.0,)
    assert json.loads(path.read_text())["gemm"]["rates"] == [5.0]


def test_without_a_cache_it_measures(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    book = RateBook(tmp_path / "file" / "rates.json", load=lambda: QUIET)
    assert book.rates("gemm", counting(5.0)) == (5.0,)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
