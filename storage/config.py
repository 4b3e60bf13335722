"""Settings of the memory tiers. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class SsdEngine(Enum):
    """How bytes reach the drive. `auto` probes; the answer stands in the run's record."""

    auto = "auto"
    gds = "gds"
    ring = "ring"
    posix = "posix"


@dataclass(kw_only=True, slots=True)
class DeviceTierConfig:
    """Budget of the device: HBM on a GPU; on CPU the bytes of saved tensors and arenas, metered by us.

    Args:
        budget_gib: GiB per rank; None means what the device has (on CPU: not enforced). 0 is refused.
    """

    budget_gib: float | None = None


@dataclass(kw_only=True, slots=True)
class HostTierConfig:
    """Pinned host slab, one per node.

    Args:
        budget_gib: GiB per node for offloaded activations; None means measured, 0 means off.
    """

    budget_gib: float | None = None


@dataclass(kw_only=True, slots=True)
class SsdTierConfig:
    """Slab files on NVMe.

    Args:
        budget_gib: GiB per node; None means measured (half of the free space), 0 means off.
        path: folder for the slab files; None means `tiers/` under the run folder.
        engine: see SsdEngine.
        required: fail when `engine` is not what the probe finds.
        num_threads: I/O threads per rank and direction.
    """

    budget_gib: float | None = None
    path: str | None = None
    engine: SsdEngine = SsdEngine.auto
    required: bool = False
    num_threads: int = 2


@dataclass(kw_only=True, slots=True)
class TiersConfig:
    """All tiers, with the integrity settings they share."""

    device: DeviceTierConfig = field(default_factory=DeviceTierConfig)
    host: HostTierConfig = field(default_factory=HostTierConfig)
    ssd: SsdTierConfig = field(default_factory=SsdTierConfig)
    checksum: bool = True
