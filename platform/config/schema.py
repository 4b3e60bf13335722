"""The configuration of a run as dataclasses; each group's class is in the part that uses it. No torch, no Ray."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from headrace.platform.control.config import ClusterConfig
from headrace.platform.planning.hardware import HardwareProfile
from headrace.platform.tracking.config import TrackingConfig
from headrace.storage.config import TiersConfig
from headrace.workers.data.config import DataConfig
from headrace.workers.memory.config import MemoryConfig
from headrace.workers.model.config import AdapterConfig, ModelConfig
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.train.config import CheckpointConfig, OptimConfig, TrainConfig


@dataclass(kw_only=True, slots=True)
class RunSettings:
    """The run itself.

    Args:
        name: for people; part of the default run folder.
        dir: run folder; None means runs/<name>-<time>/ under the current folder.
    """

    name: str
    dir: str | None = None


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run. Every field but `run` and `chunk_size` is a group: `GROUP=CHOICE` picks conf/GROUP/CHOICE.yaml.

    Args:
        chunk_size: tokens of a chunk, for memory=chunk and memory=chunk_*; null: the planner chooses.
    """

    run: RunSettings
    model: ModelConfig
    data: DataConfig
    hardware: HardwareProfile
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    chunk_size: int | None = None


@dataclass(frozen=True)
class KeyType:
    """What one key takes.

    Args:
        kind: int, float, str, bool, an Enum, a dataclass (the key holds further keys), dict (free keys) or list.
        optional: whether null is a value.
        items: of a list: int or str.
    """

    kind: type
    optional: bool
    items: type = int

    @property
    def is_branch(self) -> bool:
        """Whether the key holds further keys."""
        return self.kind is dict or is_dataclass(self.kind)

    def describe(self) -> str:
        """The values it takes, for people."""
        if isinstance(self.kind, type) and issubclass(self.kind, Enum):
            text = "one of " + ", ".join(member.name for member in self.kind)
        elif is_dataclass(self.kind):
            text = "a mapping with the keys " + ", ".join(f.name for f in fields(self.kind))
        else:
            names = {
                int: "a whole number",
                float: "a number",
                bool: "true or false",
                str: "text",
                dict: "a mapping",
                list: f"{'whole numbers' if self.items is int else 'names'} separated by commas",
            }
            text = names[self.kind]
        return f"{text}, or null" if self.optional else text


@functools.cache
def key_types() -> Mapping[str, KeyType]:
    """Every dotted key of RunConfig, branches included, with what it takes."""
    found: dict[str, KeyType] = {}
    _walk(RunConfig, "", found)
    return found


def _walk(cls: type, prefix: str, found: dict[str, KeyType]) -> None:
    for name, hint in typing.get_type_hints(cls).items():
        key_type = _key_type(hint)
        found[prefix + name] = key_type
        if is_dataclass(key_type.kind):
            _walk(key_type.kind, f"{prefix}{name}.", found)


def _key_type(hint: Any) -> KeyType:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    items = typing.get_args(kinds[0]) or (int,)
    return KeyType(typing.get_origin(kinds[0]) or kinds[0], len(kinds) < len(options), items[0])


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf of a tree of dataclasses."""
    for item in fields(node):
        value, key = getattr(node, item.name), prefix + item.name
        if is_dataclass(value):
            yield from flat_items(value, f"{key}.")
        else:
            yield key, value
