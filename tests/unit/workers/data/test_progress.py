"""The progress bar: silent without a terminal, drawn on one."""

from __future__ import annotations

import io

import pytest

from headrace.workers.data.prepare import PrepareProgress
from headrace.workers.data.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress_bar() as progress:
        assert progress is None


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar() as progress:
        assert progress is not None
        progress(PrepareProgress(3 << 20, 4 << 20, 77))
    assert "preparing data" in terminal.getvalue()
    assert "77 rows" in terminal.getvalue()
