"""Clean-ups that keep the first error: what goes wrong while things are closed is a note on it. No torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

_T = TypeVar("_T")
_P = ParamSpec("_P")


def after_error(error: BaseException, *steps: Callable[[], object]) -> None:
    """Clean up before an error goes on: every step runs, and an exception of one becomes a note on `error`."""
    for step in steps:
        try:
            step()
        except Exception as later:
            note(error, later)


def note(error: BaseException, later: BaseException) -> None:
    """Write an exception of a clean-up on the error that came before it; tracebacks show it."""
    error.add_note(f"then, while cleaning up: {type(later).__name__}: {later}")


class CleanUps(ExitStack):
    """An ExitStack that raises the first error and not the last.

    Where the block has raised, or a clean-up has, an exception of a later clean-up becomes a note on that first one. A
    context manager may still translate the block's error, with `raise ... from error`.
    """

    def callback(self, callback: Callable[_P, _T], /, *args: _P.args, **kwds: _P.kwargs) -> Callable[_P, _T]:
        """As ExitStack."""

        def leave(kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
            if error is None:
                callback(*args, **kwds)
            else:
                after_error(error, lambda: callback(*args, **kwds))

        self.push(leave)
        return callback

    def enter_context(self, cm: AbstractContextManager[_T, Any]) -> _T:
        """As ExitStack."""
        value = cm.__enter__()

        def leave(kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> Any:
            try:
                return cm.__exit__(kind, error, tb)
            except Exception as later:
                if error is None or later is error or later.__cause__ is error:
                    raise
                note(error, later)
                return False

        self.push(leave)
        return value
