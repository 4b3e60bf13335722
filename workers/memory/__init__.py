"""Memory policies. `spill` is loaded when it is asked for: plan.py and config.py are for machines without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace.workers.memory.spilling import spill

__all__ = ["spill"]


def __getattr__(name: str) -> Any:
    if name == "spill":
        from headrace.workers.memory.spilling import spill

        return spill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
