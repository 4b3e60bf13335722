"""What a person typed is text, not OmegaConf's grammar: `${...}` and `???` pass through it unread."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

# Two characters of the private use area stand for `$` and for a leading `?` while OmegaConf holds a value. YAML prints
# both as they are, and neither `$` nor a `?` before another character has a meaning in the YAML that is written.
_DOLLAR, _QUESTION = "\uf7e1\uf7e4", "\uf7e2\uf7e4"
_MISSING = "???"


def hidden(value: Any) -> Any:
    """A value, nested or not, that OmegaConf reads as plain text."""
    if isinstance(value, str) and not isinstance(value, StrEnum):
        return _QUESTION + value[1:] if value == _MISSING else value.replace("$", _DOLLAR)
    return _mapped(value, hidden)


def shown(value: Any) -> Any:
    """The value as it was typed; undoes `hidden`, also in a text that holds such values."""
    if isinstance(value, str) and not isinstance(value, StrEnum):
        return value.replace(_DOLLAR, "$").replace(_QUESTION, "?")
    return _mapped(value, shown)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(change(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: change(getattr(value, f.name)) for f in fields(value) if f.init})
    return value
