"""What a plan may use: bytes of every tier, and of the host memory that tiers and processes share. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.storage.core.records import Medium

NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Budgets:
    """Bytes of one rank; None is no limit.

    Args:
        tiers: of the device, the host slab and the SSD slab.
        memory: the rank's part of the node's host memory.
        process_bytes: of `memory`, what the processes need whatever the plan.
        device_is_memory: what is counted on the device is in host memory too (no accelerator).
    """

    tiers: Mapping[Medium, int | None]
    memory: int | None = None
    process_bytes: int = 0
    device_is_memory: bool = False

    def __getitem__(self, tier: Medium) -> int | None:
        return self.tiers[tier]

    def host_room(self, device_bytes: int) -> int:
        """What host memory has left for the host tier beside processes and device; negative where those do not fit."""
        if self.memory is None:
            return NO_LIMIT
        return self.memory - self.process_bytes - (device_bytes if self.device_is_memory else 0)

    def shortages(self, wanted: Mapping[Medium, int]) -> list[tuple[Medium | None, int, int]]:
        """(tier, bytes wanted, bytes there) of what is too small; None stands for host memory as a whole."""
        found: list[tuple[Medium | None, int, int]] = [
            (tier, num_bytes, there)
            for tier, num_bytes in wanted.items()
            if (there := self.tiers[tier]) is not None and num_bytes > there
        ]
        room = self.host_room(wanted[Medium.hbm])
        if self.memory is not None and wanted[Medium.host] > room:
            found.append((None, self.memory - room + wanted[Medium.host], self.memory))
        return found

    def excess(self, wanted: Mapping[Medium, int]) -> float:
        """How far peaks are above the budgets: the sum of the missing bytes, each over the bytes there; 0: they fit."""
        return sum((num_bytes - there) / max(1, there) for _, num_bytes, there in self.shortages(wanted))
