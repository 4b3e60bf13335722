"""Published systems as plans and degrees, for predictions from the one cost model. No torch.

A system is what its plan and its degrees make of it here: other differences (kernels, allocators, overheads) are not
modelled. OOMB is dense, without its sparsity; ALST's states on the host and SSDTrain's own SSD array are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.platform.planning.hardware import HardwareProfile
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.blocks import Part
from headrace.platform.planning.simulate.network import Network
from headrace.platform.planning.simulate.step import StepTimeline, simulate_step
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.model.config import ModelConfig
from headrace.workers.parallel.dims import ParallelDims


@dataclass(frozen=True)
class System:
    """A published system.

    Args:
        preset: where it keeps activations.
        tensor / ulysses: most ranks that it cuts weights, or heads for tokens, over.
        rings: whether the ranks that are left pass keys and values in a ring; else they have other sequences.
    """

    preset: MemoryPreset
    tensor: int = 1
    ulysses: int = 1
    rings: bool = False


SYSTEMS: Mapping[str, System] = {
    # One sequence per GPU, FSDP over all of them.
    "checkpoint": System(MemoryPreset.checkpoint),
    # Ulysses as far as the heads go, ZeRO-3 over all GPUs (arXiv 2506.13996).
    "alst": System(MemoryPreset.alst, ulysses=64),
    # On Megatron-LM: tensor parallel in a node (arXiv 2407.12117), a ring over nodes.
    "memo": System(MemoryPreset.memo, tensor=8, rings=True),
    "ssdtrain": System(MemoryPreset.ssdtrain),
    "oomb": System(MemoryPreset.chunk_host),
    # Megatron-Core with context parallelism and full recompute.
    "megatron_cp": System(MemoryPreset.recompute, tensor=8, rings=True),
}


def degrees(system: System, model: ModelConfig, num_gpus: int) -> ParallelDims:
    """How a system spreads over so many GPUs.

    Raises:
        InputError: the number is not a power of two: degrees would not divide.
    """
    if num_gpus < 1 or num_gpus & (num_gpus - 1):
        raise InputError(f"gpus={num_gpus}: a power of two, so that all degrees divide")
    tensor = _shared(model.num_kv_heads, min(system.tensor, num_gpus))
    ulysses = _shared(model.num_heads // tensor, min(system.ulysses, num_gpus // tensor))
    left = num_gpus // (tensor * ulysses)
    ring, data = (left, 1) if system.rings else (1, left)
    return ParallelDims(data, data * ulysses * ring, tensor=tensor, ulysses=ulysses, ring=ring)


def _shared(number: int, most: int) -> int:
    """The largest power of two up to `most` that divides a number."""
    return min(most, number & -number)


def system_part(system: System, model: ModelConfig, profile: HardwareProfile, seq_len: int, dims: ParallelDims) -> Part:
    """One rank of a system: a sequence of this length, in bf16, on nodes of eight GPUs."""
    shards = dims.data * dims.ulysses * dims.ring
    request = PlanRequest(
        model=model,
        seq_len=seq_len,
        profile=profile,
        preset=system.preset,
        itemsize=2,
        ranks_per_node=min(8, dims.world_size),
        num_shards=shards,
        tensor_degree=dims.tensor,
        sequence_degree=dims.ulysses * dims.ring,
        packed=False,
    )
    return Part(request, asked_plan(request), Network(dims, request.ranks_per_node, profile))


def predict_system(
    name: str, model: ModelConfig, profile: HardwareProfile, *, seq_len: int, num_gpus: int
) -> tuple[Part, StepTimeline]:
    """A rank of a system and its timeline.

    Raises:
        InputError: no such system, or see degrees.
    """
    if name not in SYSTEMS:
        raise InputError(f"system={name}: one of {', '.join(SYSTEMS)}")
    system = SYSTEMS[name]
    part = system_part(system, model, profile, seq_len, degrees(system, model, num_gpus))
    return part, simulate_step(part)


# ALST, Llama-8B on H100 80 GB: (tokens, GPUs, seconds of a step). The only published times that anything is fitted to.
CALIBRATION = ((500_000, 1, 1010.0), (1_100_000, 8, 564.0))


def calibrated(model: ModelConfig, profile: HardwareProfile) -> HardwareProfile:
    """The profile with the compute efficiency at which ALST's two times are met in the geometric mean.

    Raises:
        InputError: see predict_system.
    """
    for _ in range(8):  # a step is nearly all compute, so this converges at once
        ratio = 1.0
        for seq_len, num_gpus, seconds in CALIBRATION:
            _, timeline = predict_system("alst", model, profile, seq_len=seq_len, num_gpus=num_gpus)
            ratio *= timeline.step_s / seconds
        profile = replace(profile, compute_efficiency=profile.compute_efficiency * ratio ** (1 / len(CALIBRATION)))
    return profile
