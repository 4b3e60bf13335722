"""Settings of the memory tiers. No torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class SsdEngine(StrEnum):
    """How bytes reach the drive. `auto` probes; the result is in the run's record."""

    auto = "auto"
    gds = "gds"
    ring = "ring"
    posix = "posix"


class DirectMode(StrEnum):
    """Whether slab files are opened with O_DIRECT. `auto` measures both ways at start and takes the faster one."""

    auto = "auto"
    on = "on"
    off = "off"


@dataclass(kw_only=True, slots=True)
class EnduranceConfig:
    """How fast the drive may wear. A drive above it is an event and a metric; the run continues, and memory=auto
    goes on without the drive where a plan without it fits.

    Args:
        rated_tbw: terabytes (1e12 bytes) that the drive is rated for, several drives added up; None sets no budget:
            bytes are counted all the same.
        lifetime_years: how long the drive is to last.
    """

    rated_tbw: float | None = None
    lifetime_years: float = 5.0


@dataclass(kw_only=True, slots=True)
class DeviceTierConfig:
    """Budget of the device: HBM on a GPU; on CPU the bytes of saved tensors and arenas, metered by us.

    Args:
        budget_gib: GiB per rank; None means what the device has (on CPU: what host memory has left). 0 is refused.
    """

    budget_gib: float | None = None


@dataclass(kw_only=True, slots=True)
class HostTierConfig:
    """Pinned host slab, one per node.

    Args:
        budget_gib: GiB per node for offloaded activations; None means measured, 0 means off.
        evict: where the slab is full, the blob that is needed last spills to the drive; with False that is TierFull.
        memory_grows: this machine gets its memory as it uses it (some virtual machines), so what is free now is no
            limit: budget_gib is taken at its word. Limits of control groups still hold.
    """

    budget_gib: float | None = None
    evict: bool = False
    memory_grows: bool = False


@dataclass(kw_only=True, slots=True)
class SsdTierConfig:
    """Slab files on NVMe.

    Args:
        budget_gib: GiB per node; None means measured (half of the free space), 0 means off.
        path: folder for the slab file, or several joined by `:`, one per drive, which are then used in parallel, each
            with an equal part of the budget; None means `tiers/` under the run folder.
        engine: see SsdEngine.
        required: fail when `engine` is not what the probe finds.
        direct: see DirectMode.
        num_threads: I/O threads per rank, direction and drive.
        timeout_s: a transfer that has moved no byte for so long has failed: the drive does not answer.
        endurance: see EnduranceConfig.
    """

    budget_gib: float | None = None
    path: str | None = None
    engine: SsdEngine = SsdEngine.auto
    required: bool = False
    direct: DirectMode = DirectMode.auto
    num_threads: int = 2
    timeout_s: float = 120.0
    endurance: EnduranceConfig = field(default_factory=EnduranceConfig)

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that `path` names; none where it is None."""
        return tuple(folder for folder in (self.path or "").split(":") if folder)


@dataclass(kw_only=True, slots=True)
class TiersConfig:
    """All tiers, with the settings they share.

    Args:
        checksum: sum every blob when it enters a tier and compare when it comes back.
        drift_pct: a tier whose measured rate is this much below its profile for several steps is reported.
    """

    device: DeviceTierConfig = field(default_factory=DeviceTierConfig)
    host: HostTierConfig = field(default_factory=HostTierConfig)
    ssd: SsdTierConfig = field(default_factory=SsdTierConfig)
    checksum: bool = True
    drift_pct: float = 30.0
