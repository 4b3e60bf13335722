"""The first error is the one that is raised, whatever goes wrong while things are closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from headrace.storage.core.cleanup import CleanUps, after_error


def fails(text: str, error: type[BaseException] = OSError) -> Callable[[], None]:
    def fail() -> None:
        raise error(text)

    return fail


@contextmanager
def failing() -> Iterator[None]:
    try:
        yield
    finally:
        fails("leave")()


@contextmanager
def translating() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise KeyError("translated") from error


def leave(error: Exception | None, *clean_ups: Callable[[], object] | AbstractContextManager[None]) -> None:
    """A block with clean-ups that raises an error, or none."""
    with CleanUps() as closing:
        for clean_up in clean_ups:
            if isinstance(clean_up, AbstractContextManager):
                closing.enter_context(clean_up)
            else:
                closing.callback(clean_up)
        if error is not None:
            raise error


def test_the_error_of_the_block_is_raised_and_all_clean_ups_run() -> None:
    ran: list[int] = []
    with pytest.raises(ValueError, match="first") as caught:
        leave(ValueError("first"), lambda: ran.append(1), fails("a"), fails("b"), failing())
    assert ran == [1]
    assert caught.value.__notes__ == [f"then, while cleaning up: OSError: {it}" for it in ("leave", "b", "a")]


def test_without_an_error_of_the_block_the_first_clean_up_that_fails_is_raised() -> None:
    with pytest.raises(OSError, match="b") as caught:
        leave(None, fails("a"), fails("b"))
    assert str(caught.value) == "b"
    assert caught.value.__notes__ == ["then, while cleaning up: OSError: a"]


def test_a_context_manager_may_translate_the_error() -> None:
    with pytest.raises(KeyError, match="translated"):
        leave(ValueError("first"), fails("a"), translating())


def test_an_interrupt_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(ValueError("first"), fails("once more", KeyboardInterrupt))


def test_steps_after_an_error_all_run_and_are_noted() -> None:
    ran: list[int] = []
    error = ValueError("first")
    after_error(error, fails("a"), lambda: ran.append(1), fails("c"))
    assert ran == [1]
    assert [text[-1] for text in error.__notes__] == ["a", "c"]
