"""Words of the verbs that take a few flags and keys of their own, and the hint for every word that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from headrace.storage.core.errors import InputError

TORCH_SPELLINGS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def did_you_mean(word: str, known: Collection[str]) -> str:
    """A sentence that names the nearest of `known`; empty where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1)
    if not near:  # `steps` for `train.steps`: the same last part
        near = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]][:1]
    return f"did you mean `{near[0]}`?" if near else ""


def hint(word: str, known: Collection[str]) -> str:
    """The nearest of `known`, or all of them."""
    return did_you_mean(word, known) or f"known: {', '.join(known)}"


def split_flags(argv: Sequence[str], known: Sequence[str]) -> tuple[set[str], list[str]]:
    """Flags (`--json`) apart from the other words.

    Raises:
        InputError: an unknown flag.
    """
    flags = {word for word in argv if word.startswith("-")}
    for flag in sorted(flags - set(known)):
        raise InputError(f"unknown flag {flag}; {hint(flag, known)}")
    return flags, [word for word in argv if not word.startswith("-")]


def read_keys(words: Sequence[str], types: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, of these types: str, int, float, bool, an Enum by its values, one of these with None, list[int].

    Raises:
        InputError: a word without `=`, an unknown or repeated key, an empty value or one of another type.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is not KEY=VALUE; the keys are {', '.join(types)}")
        if key not in types:
            raise InputError(f"no key {key!r}; {hint(key, tuple(types))}")
        if key in values:
            raise InputError(f"{key} is given twice; give it once")
        if not text:
            raise InputError(f"{key}= has no value; give {key}=...")
        values[key] = _convert(key, text, types[key])
    return values


def check_text(words: Iterable[str]) -> None:
    """Refuse words that are no text: they could be written into no record.

    Raises:
        InputError: a word is not UTF-8.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"{word.encode(errors='surrogateescape')!r}: not UTF-8; rename it") from None


def pick(key: str, text: str, known: Sequence[str]) -> str:
    """`text` where it is one of `known`.

    Raises:
        InputError: it is not.
    """
    if text not in known:
        raise InputError(f"{key}={text}: one of {', '.join(known)}; {hint(text, known)}")
    return text


def pick_dtype(key: str, text: str, known: Sequence[str]) -> str:
    """As `pick`, for a dtype; torch's spelling (`bfloat16`) means ours (`bf16`)."""
    return pick(key, TORCH_SPELLINGS.get(text, text), known)


def whole_numbers(key: str, text: str) -> list[int]:
    """`1024,4096`, or as YAML writes them, `[1024, 4096]`; nothing is an empty list.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in separated(text)]
    except ValueError:
        raise InputError(f"{key}={text}: expected whole numbers separated by commas") from None


def separated(text: str) -> list[str]:
    """`a,b`, or as YAML writes them, `[a, b]`; nothing is an empty list."""
    inside = text.strip().removeprefix("[").removesuffix("]")
    return [part.strip() for part in inside.split(",")] if inside.strip() else []


def _convert(key: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is list:
        return whole_numbers(key, text)
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if NoneType in options and text.lower() in ("null", "none"):
        return None
    kind = next(option for option in options if option is not NoneType)
    if issubclass(kind, Enum):
        names = [member.value for member in kind]
        return kind(pick_dtype(key, text, names) if TORCH_SPELLINGS.get(text) in names else pick(key, text, names))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key}={text}: true or false is expected")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{key}={text}: {wanted} is wanted") from None
