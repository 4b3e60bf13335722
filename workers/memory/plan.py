"""The memory plan: what every layer leaves, and where. Solved in platform/planning, obeyed in workers. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset


class Residence(StrEnum):
    """Where a class of skeletal tensors lives between forward and backward."""

    hbm = "hbm"
    host = "host"
    ssd = "ssd"
    recompute = "recompute"


class Sweep(StrEnum):
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
            raise ValueError(f"rest={self.rest.value} is not supported; choose hbm or recompute")
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

    def medium_of(self, layer: int) -> Medium | None:
        """The tier that block `layer`'s input is moved to; None where it stays on the device."""
        plan = self.layers[layer]
        return None if plan.layer_input is Residence.hbm else Medium(plan.layer_input.value)


UNIFORM_PRESETS: Mapping[MemoryPreset, LayerPlan] = {
    MemoryPreset.keep: LayerPlan(),
    MemoryPreset.recompute: LayerPlan(Residence.hbm, Residence.recompute),
    MemoryPreset.checkpoint: LayerPlan(Residence.hbm, Residence.recompute),
    MemoryPreset.offload_host: LayerPlan(Residence.host, Residence.recompute),
    MemoryPreset.offload_ssd: LayerPlan(Residence.ssd, Residence.recompute),
}


def preset_plan(preset: MemoryPreset | str, num_layers: int, prefetch_layers: int = 1) -> MemoryPlan:
    """The plan of a preset that treats every block alike.

    Raises:
        InputError: no such preset, or `auto`, which depends on the machine and is solved in platform/planning.
    """
    names = ", ".join(p.value for p in UNIFORM_PRESETS)
    try:
        preset = MemoryPreset(preset)
        layer = UNIFORM_PRESETS[preset]
    except (ValueError, KeyError):
        value = preset.value if isinstance(preset, MemoryPreset) else preset
        raise InputError(f"memory={value}: not a plan that treats every layer alike; choose one of {names}") from None
    return MemoryPlan.uniform(preset.value, num_layers, layer, prefetch_layers)


def planned_transfer_bytes(
    plan: MemoryPlan, layer_input_bytes: int | Sequence[int], micro_batches: int = 1
) -> dict[Medium, int]:
    """Bytes that one optimizer step of one rank stores to each tier, which are also the bytes it loads back.

    Every block whose input lives on a tier stores it once in forward and loads it once in backward, per micro-batch:
    bytes[tier] = micro_batches * sum(layer_input_bytes[i] for blocks i whose input lives on that tier).

    Args:
        layer_input_bytes: of one micro-batch; one number for all blocks, or one per block.
        micro_batches: forward-and-backward passes per step. Evaluation passes move nothing.
    """
    each = [layer_input_bytes] * len(plan.layers) if isinstance(layer_input_bytes, int) else list(layer_input_bytes)
    if len(each) != len(plan.layers):
        raise ValueError(f"{len(each)} layer input sizes for a plan of {len(plan.layers)} layers")
    moved = {Medium.host: 0, Medium.ssd: 0}
    for layer, num_bytes in enumerate(each):
        medium = plan.medium_of(layer)
        if medium is not None:
            moved[medium] += micro_batches * num_bytes
    return moved
