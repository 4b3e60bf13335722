"""Which engine moves bytes to the drive: requested, found, and why. A change is always reported."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.storage.config import SsdEngine, SsdTierConfig
from headrace.storage.core.errors import MachineError
from headrace.storage.core.records import Lease
from headrace.storage.tiers.gds import probe_gds
from headrace.storage.transfer import CudaCopies, DeviceCopies


@dataclass(frozen=True)
class EngineChoice:
    """The probe's answer.

    Args:
        wanted: the engine of the configuration.
        got: what will move the bytes: gds, ring or posix.
        why: how that is known.
    """

    wanted: SsdEngine
    got: SsdEngine
    why: str

    def record(self) -> dict[str, str]:
        """JSON-able."""
        return {"wanted": self.wanted.value, "got": self.got.value, "why": self.why}


def choose_engine(lease: Lease, config: SsdTierConfig, copies: DeviceCopies) -> EngineChoice:
    """Probe, and settle on an engine.

    Raises:
        MachineError: `config.required` is set and the requested engine does not work.
    """
    choice = _choose(lease, config.engine, copies)
    if config.required and config.engine not in (SsdEngine.auto, choice.got):
        raise MachineError(
            f"ssd tier: engine {config.engine.value} is required, {choice.got.value} is there: "
            f"{choice.why}; set tiers.ssd.required=false or tiers.ssd.engine=auto to run without it"
        )
    return choice


def _choose(lease: Lease, wanted: SsdEngine, copies: DeviceCopies) -> EngineChoice:
    direct = "with O_DIRECT" if lease.direct else "through the page cache"
    if lease.direct_why:
        direct += f" ({lease.direct_why})"
    if not isinstance(copies, CudaCopies):
        return EngineChoice(wanted, SsdEngine.posix, f"the device is {copies.device}; pwritev and preadv {direct}")
    ring = f"page-locked staging ring on a side stream, pwritev and preadv {direct}"
    if wanted is SsdEngine.posix:
        ring += "; posix serves CPU tensors only"
    if wanted in (SsdEngine.ring, SsdEngine.posix):
        return EngineChoice(wanted, SsdEngine.ring, ring)
    fault = probe_gds(lease, copies)
    if fault is not None:
        return EngineChoice(wanted, SsdEngine.ring, f"{ring}; GPUDirect Storage does not work here: {fault}")
    return EngineChoice(wanted, SsdEngine.gds, "a probe written from device memory moved the counters of nvidia-fs")
