"""The memory plan: what every layer leaves, and where. Solved in platform/planning, obeyed in workers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Residence(Enum):
    """Where a class of skeletal tensors lives between forward and backward."""

    hbm = "hbm"
    host = "host"
    ssd = "ssd"
    recompute = "recompute"


class Sweep(Enum):
    """Which loop is outside: over layers, or over token chunks."""

    by_layer = "by_layer"
    by_chunk = "by_chunk"


@dataclass(frozen=True)
class LayerPlan:
    """One decoder block.

    Args:
        layer_input: residence of the block's input (hbm, host or ssd; a block input cannot be recomputed).
        rest: hbm keeps every other saved tensor, recompute runs the block again in backward.
            With rest = hbm the input stays too: autograd already holds it.
    """

    layer_input: Residence = Residence.hbm
    rest: Residence = Residence.hbm

    def __post_init__(self) -> None:
        if self.layer_input is Residence.recompute:
            raise ValueError("a layer's input cannot be recomputed; choose hbm, host or ssd")
        if self.rest not in (Residence.hbm, Residence.recompute):
            raise ValueError(f"rest={self.rest.value} is not built; choose hbm or recompute")
        if self.rest is Residence.hbm and self.layer_input is not Residence.hbm:
            raise ValueError("rest=hbm keeps the layer input on the device: layer_input must be hbm")


@dataclass(frozen=True)
class MemoryPlan:
    """The whole plan of one rank.

    Args:
        name: preset or "auto".
        layers: one entry per decoder block, in forward order.
        prefetch_layers: loads are started this many blocks ahead of the backward pass.
        predicted: what the planner expects, by metric name; the run records it beside what it measured.
    """

    name: str
    layers: tuple[LayerPlan, ...]
    sweep: Sweep = Sweep.by_layer
    prefetch_layers: int = 1
    predicted: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, the content of plan.json."""
        return {
            "name": self.name,
            "sweep": self.sweep.value,
            "prefetch_layers": self.prefetch_layers,
            "layers": [{"layer_input": p.layer_input.value, "rest": p.rest.value} for p in self.layers],
            "predicted": dict(self.predicted),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """Inverse of to_dict. Raises KeyError or ValueError on a file that is not a plan."""
        layers = tuple(LayerPlan(Residence(p["layer_input"]), Residence(p["rest"])) for p in data["layers"])
        return cls(
            data["name"], layers, Sweep(data["sweep"]), int(data["prefetch_layers"]), dict(data.get("predicted", {}))
        )

    @classmethod
    def uniform(cls, name: str, num_layers: int, layer: LayerPlan, prefetch_layers: int = 1) -> MemoryPlan:
        """The same LayerPlan for every block."""
        return cls(name, (layer,) * num_layers, prefetch_layers=prefetch_layers)

    def num_layers_in(self, residence: Residence) -> int:
        """How many layer inputs live in `residence` and are moved or kept there for a recompute."""
        return sum(p.rest is Residence.recompute and p.layer_input is residence for p in self.layers)
