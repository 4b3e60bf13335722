"""`key=value` words of the verbs that take a few keys of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.platform.config.words import did_you_mean
from headrace.storage.core.errors import InputError


def split_flags(argv: Sequence[str], known: Sequence[str]) -> tuple[set[str], list[str]]:
    """Flags (`--json`) apart from the other words.

    Raises:
        InputError: an unknown flag.
    """
    flags = {word for word in argv if word.startswith("-")}
    for flag in sorted(flags - set(known)):
        raise InputError(f"unknown flag {flag}; {_hint(flag, known)}")
    return flags, [word for word in argv if not word.startswith("-")]


def read_keys(words: Sequence[str], types: Mapping[str, type]) -> dict[str, Any]:
    """Values by key, of the types asked for (str, int, float).

    Raises:
        InputError: a word without `=`, an unknown or repeated key, an empty value or one of another type.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not KEY=VALUE; the keys are {', '.join(types)}")
        if key not in types:
            raise InputError(f"no key {key!r}; {_hint(key, tuple(types))}")
        if key in values:
            raise InputError(f"{key} is given twice; give it once")
        if not text:
            raise InputError(f"{key}= has no value; give {key}=...")
        try:
            values[key] = types[key](text)
        except ValueError:
            kind = "a whole number" if types[key] is int else "a number"
            raise InputError(f"{key}={text}: {kind} is wanted") from None
    return values


def pick(key: str, text: str, known: Sequence[str]) -> str:
    """`text` where it is one of `known`.

    Raises:
        InputError: it is not.
    """
    if text not in known:
        raise InputError(f"{key}={text}: one of {', '.join(known)}; {_hint(text, known)}")
    return text


def _hint(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known) or f"known: {', '.join(known)}"
