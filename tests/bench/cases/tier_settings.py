"""The options of `headrace bench tiers`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from headrace.bench.devices import device_named
from headrace.bench.harness import OptionValue
from headrace.platform.keys import pick
from headrace.storage.config import DirectMode, SsdEngine
from headrace.storage.core.errors import InputError
from headrace.storage.core.ledger import PAGE_BYTES
from headrace.storage.core.records import Medium

MIB = 1024**2
UNITS = {"": 1, "K": 1024, "M": MIB, "G": 1024**3}
DEFAULTS: Mapping[str, OptionValue] = {
    "tiers": "host,ssd",
    # What has targets first: the time may run out.
    "sizes": "4M,16M,64M,256M,64K,256K,1M",
    "rounds": 5,
    # Bytes of a pass. 0 is 512 on CPU and 2048 on CUDA, where 512 would be over in 10 ms.
    "host_mib": 0,
    # The slab file is three times as large: ours with and without checksum, and fio's.
    "ssd_mib": 512,
    "in_flight": 4,
    "num_threads": 2,
    "engine": "auto",
    "device": "auto",
    "direct": "on",
    "folder": "",
    "fio": "",
    "overlap": True,
    "stretch_s": 0.4,
    "limit_s": 220.0,
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        sizes: bytes of a block, in the order of measuring.
        rounds: of what has a target.
        host_bytes / ssd_bytes: of one pass at most.
        in_flight: blocks between prepare and complete.
        num_threads: I/O threads per direction.
        engine: what was asked for; `engines` is what that means here.
        direct: of the slab file; `on` by default, because the targets are for O_DIRECT.
        folder: where the scratch folder is made; empty: on the checkout's file system.
        fio: a program; empty: the one of PATH.
        stretch_s: of matrix products, in the overlap rows.
        limit_s: no case is begun after so many seconds.
    """

    tiers: tuple[Medium, ...]
    sizes: tuple[int, ...]
    rounds: int
    host_bytes: int
    ssd_bytes: int
    in_flight: int
    num_threads: int
    engine: SsdEngine
    engines: tuple[SsdEngine, ...]
    device: torch.device
    direct: DirectMode
    folder: str
    fio: str
    overlap: bool
    stretch_s: float
    limit_s: float


def read_settings(options: Mapping[str, OptionValue]) -> Settings:
    """The options as values.

    Raises:
        InputError: one of them makes no sense, alone or with the others or on this machine.
    """
    device = device_named(str(options["device"]))
    engine = SsdEngine(pick("engine", str(options["engine"]), [kind.value for kind in SsdEngine]))
    tiers = tuple(Medium(pick("tiers", word, ("host", "ssd"))) for word in _words("tiers", options))
    sizes = tuple(parse_size(word) for word in _words("sizes", options))
    host_mib = _positive("host_mib", options, least=0) or (2048 if device.type == "cuda" else 512)
    pass_bytes = {Medium.host: host_mib * MIB, Medium.ssd: _positive("ssd_mib", options) * MIB}
    for tier in tiers:
        if max(sizes) > pass_bytes[tier]:
            raise InputError(
                f"sizes={options['sizes']}: a block of {size_name(max(sizes))} is more than a pass of "
                f"{tier.value}_mib={pass_bytes[tier] // MIB}; leave it out or raise {tier.value}_mib"
            )
    return Settings(
        tiers=tiers,
        sizes=sizes,
        rounds=_positive("rounds", options),
        host_bytes=pass_bytes[Medium.host],
        ssd_bytes=pass_bytes[Medium.ssd],
        in_flight=_positive("in_flight", options),
        num_threads=_positive("num_threads", options),
        engine=engine,
        engines=_engines(engine, device),
        device=device,
        direct=DirectMode(pick("direct", str(options["direct"]), [mode.value for mode in DirectMode])),
        folder=str(options["folder"]),
        fio=str(options["fio"]),
        overlap=bool(options["overlap"]),
        stretch_s=float(options["stretch_s"]),
        limit_s=float(options["limit_s"]),
    )


def parse_size(word: str) -> int:
    """Bytes of `64K`, `4M`, `1G` or a plain number.

    Raises:
        InputError: another word, or no multiple of 4096 bytes, which O_DIRECT of fio needs.
    """
    found = re.fullmatch(r"(\d+)([KMG]?)", word.upper())
    num_bytes = int(found[1]) * UNITS[found[2]] if found else 0
    if num_bytes == 0 or num_bytes % PAGE_BYTES:
        raise InputError(f"sizes={word}: wanted is a multiple of {PAGE_BYTES} bytes, such as 64K, 4M or 1G")
    return num_bytes


def size_name(num_bytes: int) -> str:
    """64KiB, 4MiB: the largest unit that fits without a rest."""
    for unit, name in ((UNITS["G"], "GiB"), (UNITS["M"], "MiB"), (UNITS["K"], "KiB")):
        if num_bytes % unit == 0:
            return f"{num_bytes // unit}{name}"
    return f"{num_bytes}B"


def _engines(engine: SsdEngine, device: torch.device) -> tuple[SsdEngine, ...]:
    here = (SsdEngine.ring, SsdEngine.gds) if device.type == "cuda" else (SsdEngine.posix,)
    if engine is SsdEngine.auto:
        return here
    if engine not in here:
        names = " or ".join(kind.value for kind in here)
        raise InputError(f"engine={engine.value}: on {device.type} the engine is {names}; give that, or engine=auto")
    return (engine,)


def _positive(key: str, options: Mapping[str, OptionValue], *, least: int = 1) -> int:
    value = int(options[key])
    if value < least:
        raise InputError(f"{key}={value}: at least {least}")
    return value


def _words(key: str, options: Mapping[str, OptionValue]) -> list[str]:
    words = [word for word in str(options[key]).split(",") if word]
    if not words:
        raise InputError(f"{key}={options[key]}: at least one is expected")
    return words
