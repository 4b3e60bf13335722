"""Which NUMA node a rank wants its host memory on: that of its GPU, or that of its cores. No torch, no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from headrace.storage.tiers.numa import PROC, SYS, cores_by_node

VISIBLE = "CUDA_VISIBLE_DEVICES"


def rank_node(
    device: str,
    local_rank: int,
    *,
    sys: Path = SYS,
    proc: Path = PROC,
    environ: Mapping[str, str] | None = None,
    cores: frozenset[int] | None = None,
) -> int | None:
    """The node near a rank of the calling process; None where the machine does not say, or where cores are of several.

    Args:
        device: "cuda" or "cpu".
        local_rank: picks the GPU where the process sees several, as `pick_device` does.
        sys / proc: where /sys and /proc are mounted.
        environ / cores: of the process; None asks it.
    """
    if device == "cuda":
        addresses = visible_gpus(proc=proc, environ=os.environ if environ is None else environ)
        index = 0 if len(addresses) == 1 else local_rank
        return _node_of_gpu(addresses[index], sys) if index < len(addresses) else None
    own = frozenset(os.sched_getaffinity(0)) if cores is None else cores
    return next((node for node, there in cores_by_node(sys=sys).items() if own <= there), None)


def visible_gpus(*, proc: Path = PROC, environ: Mapping[str, str]) -> list[str]:
    """PCI addresses of the GPUs that CUDA shows to a process, in CUDA's order.

    CUDA_VISIBLE_DEVICES counts in the order of the PCI bus here. CUDA's own default puts the fastest GPU first, which
    is the same where all are alike, and can be set (CUDA_DEVICE_ORDER=PCI_BUS_ID). As in CUDA, an entry that names no
    GPU ends the list; parts of a GPU (MIG) are not looked up.
    """
    uuids = _uuids(proc / "driver/nvidia/gpus")
    there = sorted(uuids, key=_by_address)
    chosen = environ.get(VISIBLE)
    if chosen is None:
        return there
    found: list[str] = []
    for word in (part.strip() for part in chosen.split(",")):
        if word.isdigit():
            named = there[int(word) : int(word) + 1]
        else:
            named = [address for address in there if word and uuids[address].startswith(word)]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return found


def _uuids(folder: Path) -> dict[str, str]:
    """UUID by PCI address, as the driver lists them."""
    found = {}
    for path in folder.glob("*/information"):
        facts = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        found[path.parent.name] = facts.get("GPU UUID", "").strip()
    return found


def _by_address(address: str) -> tuple[int, ...]:
    """Domain, bus, device, function of an address such as 0000:3b:00.0."""
    return tuple(int(part, 16) for part in address.replace(".", ":").split(":"))


def _node_of_gpu(address: str, sys: Path) -> int | None:
    try:
        node = int((sys / "bus/pci/devices" / address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say
