"""A configuration as sorted `key: value` lines: what a reviewer reads when a default changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any


def flat_text(config: Any) -> str:
    """One line per key, sorted, values as JSON; ends with a newline."""
    lines = sorted(f"{key}: {json.dumps(value)}" for key, value in flat_items(config))
    return "\n".join(lines) + "\n"


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf of a tree of dataclasses."""
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from flat_items(value, f"{key}.")
        else:
            yield key, value
