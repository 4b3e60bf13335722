"""Mixers by name. No torch.

A mixer is one file with a registration:

    @register("gla")
    class GatedLinearAttention: ...          see Mixer

Those of other packages are found by an entry point: in their pyproject.toml

    [project.entry-points."headrace.mixers"]
    gla = "their_package.gla"                the module that registers it
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

from headrace.storage.core.errors import InputError
from headrace.workers.model.config import ATTENTION
from headrace.workers.model.segments import DenseShape, Segment

ENTRY_POINTS = "headrace.mixers"
# Ours, and the modules that register them.
_OURS = {ATTENTION: "headrace.workers.model.mixers.attention"}


class MixerPart(NamedTuple):
    """A mixer's part of a block.

    Args:
        segments: in order. They read the normed input `n1` and the block's input `x`; the last one makes `residual`, as
            wide as `x`.
        skeletal: names of the tensors that a plan may place, in the order in which they are made, `residual` apart; the
            states of scans are among them.
    """

    segments: tuple[Segment, ...]
    skeletal: tuple[str, ...]


class Mixer(Protocol):
    """What is registered. `part` imports no torch; the others import it where they need it.

    Attributes:
        leaf: the block's attribute that holds the module, with which the names of its parameters begin.
    """

    leaf: str

    def part(self, shape: DenseShape) -> MixerPart:
        """The segments of a block of this shape."""
        ...

    def module(self, config: Any, **place: Any) -> Any:
        """The nn.Module: (n1, rope, packing, cache) to what is added to x, all (B, T, H). It runs where no plan is.

        Args:
            config: ModelConfig.
            place: dtype, device and operators.
        """
        ...

    def rules(self, config: Any, operators: Any, segments: tuple[Segment, ...]) -> tuple[Any, ...]:
        """One rule for each of the segments (program.py, scan.py), over the parameters of the module."""
        ...


_mixers: dict[str, Mixer] = {}


def register(name: str) -> Callable[[type], type]:
    """Register a class as the mixer of this name. Raises ValueError where another one has the name."""

    def add(kind: type) -> type:
        there = _mixers.get(name)
        if there is not None and (type(there).__module__, type(there).__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ValueError(f"mixer {name!r}: {type(there).__module__} has registered one of this name")
        _mixers[name] = kind()
        return kind

    return add


def mixer_named(name: str) -> Mixer:
    """The mixer of a name.

    Raises:
        InputError: nobody has registered it.
    """
    if name not in _mixers and name in _OURS:
        import_module(_OURS[name])
    for entry in () if name in _mixers else entry_points(group=ENTRY_POINTS, name=name):
        entry.load()
    if name not in _mixers:
        known = sorted({*_OURS, *_mixers, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})
        raise InputError(
            f"model.mixers: {name!r} is not registered; choose among {', '.join(known)}, or install the package that "
            f"has it under the entry point {ENTRY_POINTS}"
        )
    return _mixers[name]
