"""The tiers beside the machine: GB/s per tier, engine, direction and block size, and copies beside compute.

Every row holds our rate through the six verbs (`in_flight` blocks between prepare and complete, random bytes, loads
compared with what was stored) and, from the same minutes, what the machine does without us:

    ssd           fio on the same range of the same file: same block size, O_DIRECT where ours has it, and as many
                  blocks in flight as our I/O threads move parts
    host, CPU     one plain large copy, the better of numpy with one thread and torch with all
    host, CUDA    cudaMemcpyAsync from and to page-locked memory, same block size, as many in flight as ours

tier_rounds.py says how the two take turns and what a ratio is. The range is written once before
anything is measured: the first write to preallocated blocks costs the file system more than all later ones. Blocks of
4 MiB and more have targets and `rounds` rounds; smaller ones promise nothing and have fewer. The checksum is on, as in
training; the rows `no_checksum` say what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.tier_copies import PinnedCopy, PlainCopy
from headrace.bench.tier_fio import FileRange, Fio, find_fio
from headrace.bench.tier_overlap import overlap_row
from headrace.bench.tier_place import cached_pages, file_system, scratch_folder
from headrace.bench.tier_rounds import Pass, Series, numbers, take_turns
from headrace.bench.tier_settings import DEFAULTS, Settings, read_settings, size_name
from headrace.bench.tier_sigterm import clean_end_on_sigterm, end_if_told
from headrace.bench.tier_traffic import TierTraffic, random_bytes
from headrace.storage.blockio.direct_file import probe_direct
from headrace.storage.build import open_stack
from headrace.storage.config import DirectMode, SsdEngine, SsdTierConfig, TiersConfig
from headrace.storage.core.errors import HeadraceError, MachineError
from headrace.storage.core.records import Direction, Lease, Medium
from headrace.storage.tiers.host_slab import HostSlab
from headrace.storage.tiers.ssd_slab import SsdSlab
from headrace.storage.transfer_log import TransferLog

DESCRIPTION = (
    "GB/s of the tiers by block size, compared with fio, a plain copy and cudaMemcpyAsync; copies during compute"
)
OPTIONS: Mapping[str, OptionValue] = DEFAULTS
TARGET_FROM_BYTES = 4 * 1024**2
# Rounds of what has no target, and blocks of a pass, so that small ones do not take the time of the large ones.
ROUNDS_WITHOUT_TARGET = 3
MOST_BLOCKS = 1024
# A slow drive need not move everything in every pass: about so long is enough, but not less than this share.
PASS_S, LEAST_SHARE = 0.35, 0.25
SSD_TARGET, HOST_TARGET, CUDA_TARGET = 0.90, 0.90, 0.95
TOO_LATE = "not started: the time limit of the whole benchmark (limit_s) has passed"
WORDS = {Direction.store: "write", Direction.load: "read"}
VARIANTS = {"": True, "no_checksum": False}

Machine = Callable[[Direction, int, int], Pass]


@dataclass
class Bed:
    """One tier with one engine, ready to be measured.

    Args:
        name: of the rows: tier/engine.
        traffic: by variant.
        machine: direction, block bytes, bytes of the pass -> the machine's pass; None where it cannot be measured.
        target: the least ratio, and what to.
        machine_depth: blocks that the machine's side keeps in flight, where there are as many; None for one large copy.
        setting: of direction and block bytes -> how the machine was told to move them, once it has.
        shared: all write to one range, so that bytes are stored again before they are loaded.
        cached_pages: counts our pages in the page cache; None where there is no file.
        most_cached_pages: seen after any pass of stores; None before the first one.
        plain: of host memory, which the overlap on CPU is a share of.
        warm_gbps: of the last stores before a case; None before the first case.
    """

    name: str
    medium: Medium
    round_bytes: int
    traffic: dict[str, TierTraffic]
    machine: Machine | None
    target: tuple[float, str]
    config: dict[str, object]
    machine_depth: int | None = None
    setting: Callable[[Direction, int], str] | None = None
    shared: bool = False
    cached_pages: Callable[[], int] | None = None
    most_cached_pages: int | None = None
    plain: PlainCopy | None = None
    warm_gbps: float | None = None


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per tier, engine, direction, block size and variant; then page cache and overlap of the tier.

    A tier for which the machine has no room is a row with the reason.

    Raises:
        InputError: an option makes no sense here.
    """
    settings = read_settings(options)
    until_s = time.monotonic() + settings.limit_s
    with clean_end_on_sigterm():
        for number, tier in enumerate(settings.tiers):
            beds = _host_beds if tier is Medium.host else _ssd_beds
            try:
                yield from beds(settings, _share_of_time(until_s, len(settings.tiers) - number))
            except MachineError as error:
                yield Row(tier.value, error=str(error))


def _share_of_time(until_s: float, num_left: int) -> float:
    """When the first of `num_left` parts must end, so that a slow one leaves the others their time."""
    now_s = time.monotonic()
    return now_s + (until_s - now_s) / num_left


def _measured(bed: Bed, settings: Settings, until_s: float) -> Iterator[Row]:
    for block_bytes in settings.sizes:
        yield from _sweep(bed, settings, block_bytes, until_s)
    if bed.cached_pages is not None:
        yield _page_cache_row(bed)
    if settings.overlap:
        yield _overlap(bed, settings, until_s)


def _sweep(bed: Bed, settings: Settings, block_bytes: int, until_s: float) -> Iterator[Row]:
    """Rows of one block size: both directions, and without checksum where there is a target."""
    num_blocks = _num_blocks(bed, block_bytes)
    size = size_name(block_bytes)
    for direction in Direction:
        name = f"{bed.name}/{WORDS[direction]}/{size}"
        if time.monotonic() > until_s:
            yield Row(name, config=bed.config, error=TOO_LATE)
            continue
        try:
            if direction is Direction.store:
                _warm_up(bed, block_bytes, num_blocks)
            yield from _case(bed, settings, name, direction, block_bytes, num_blocks)
        except HeadraceError as error:
            yield Row(name, config=bed.config, error=str(error))


def _num_blocks(bed: Bed, block_bytes: int) -> int:
    """Of a pass. The first case of a bed moves all its bytes, so that every page and block of it has been written."""
    wanted_bytes = bed.round_bytes
    if bed.warm_gbps is not None:
        wanted_bytes = max(round(LEAST_SHARE * bed.round_bytes), round(PASS_S * bed.warm_gbps * 1e9))
        wanted_bytes = max(wanted_bytes, 2 * block_bytes)
    num_blocks = min(wanted_bytes, bed.round_bytes) // block_bytes
    return num_blocks if bed.warm_gbps is None else min(MOST_BLOCKS, num_blocks)


def _warm_up(bed: Bed, block_bytes: int, num_blocks: int) -> None:
    """One pass each way, every block compared, and the page cache looked at after the stores."""
    for traffic in bed.traffic.values():
        end_if_told()
        traffic.use_blocks(block_bytes, num_blocks)
        bed.warm_gbps = traffic.store_pass().gbps
        if bed.cached_pages is not None:
            bed.most_cached_pages = max(bed.most_cached_pages or 0, bed.cached_pages())
        traffic.load_pass(check_all=True)


def _case(
    bed: Bed, settings: Settings, name: str, direction: Direction, block_bytes: int, num_blocks: int
) -> Iterator[Row]:
    has_target = block_bytes >= TARGET_FROM_BYTES
    few = min(settings.rounds, ROUNDS_WITHOUT_TARGET)
    rounds = {"": settings.rounds if has_target else few, **({"no_checksum": few} if has_target else {})}
    ours = {
        variant: (_pass_of(bed.traffic[variant], direction, stored=not bed.shared), count)
        for variant, count in rounds.items()
    }
    num_bytes = block_bytes * num_blocks
    machine = None if bed.machine is None else partial(bed.machine, direction, block_bytes, num_bytes)
    series, around = take_turns(ours, machine)
    for variant, found in series.items():
        config = {
            **bed.config,
            "block_bytes": block_bytes,
            "pass_bytes": num_bytes,
            "checksum": VARIANTS[variant],
            "ours_gbps_each": [round(one.gbps, 3) for one in found.passes],
            "machine_gbps_each": [round(one.gbps, 3) for one in around],
        }
        if bed.machine_depth is not None:
            config["machine_in_flight"] = min(bed.machine_depth, num_blocks)
        if bed.setting is not None:
            config["machine_setting"] = bed.setting(direction, block_bytes)
        row = numbers(found, around)
        if variant:
            row["speed_over_checksum_on"] = found.gbps / series[""].gbps
        target = _target(bed, found) if has_target and not variant else None
        yield Row(f"{name}/{variant}" if variant else name, row, config, target)


def _pass_of(traffic: TierTraffic, direction: Direction, *, stored: bool) -> Callable[[], Pass]:
    """One timed pass. Bytes that others may have overwritten are stored first, outside of the time."""
    if direction is Direction.store:
        return traffic.store_pass
    if stored:
        return traffic.load_pass

    def load_again() -> Pass:
        traffic.store_pass()
        return traffic.load_pass()

    return load_again


def _target(bed: Bed, found: Series) -> Target | None:
    least, of = bed.target
    return None if found.ratio is None else Target(f"at least {least:.0%} of {of}", found.ratio >= least)


def _page_cache_row(bed: Bed) -> Row:
    """O_DIRECT leaves nothing; a file system that refuses it promises nothing."""
    name = f"{bed.name}/page_cache"
    if bed.most_cached_pages is None:
        return Row(name, config=bed.config, error=TOO_LATE)
    target = Target("no page in the page cache after the writes", bed.most_cached_pages == 0)
    found = {"cached_pages": bed.most_cached_pages}
    return Row(name, found, bed.config, target if bed.config["direct"] else None)


def _overlap(bed: Bed, settings: Settings, until_s: float) -> Row:
    name = f"{bed.name}/overlap"
    if time.monotonic() > until_s:
        return Row(name, config=bed.config, error=TOO_LATE)
    try:
        row = overlap_row(
            name,
            bed.traffic[""],
            bed.medium,
            settings.device,
            bed.plain,
            round_bytes=bed.round_bytes,
            rounds=settings.rounds,
            stretch_s=settings.stretch_s,
        )
    except HeadraceError as error:
        return Row(name, config=bed.config, error=str(error))
    return Row(row.name, row.numbers, {**bed.config, **row.config}, row.target)


def _host_beds(settings: Settings, until_s: float) -> Iterator[Row]:
    with ExitStack() as undo:
        slab = undo.enter_context(HostSlab(2 * settings.host_bytes, run_id="bench"))
        source = random_bytes(settings.host_bytes, settings.device)
        leases = {variant: slab.lease(variant or "checksum", settings.host_bytes) for variant in VARIANTS}
        traffic = _open_traffic(undo, settings, leases, source, SsdEngine.auto)
        config = {"device": str(settings.device), "in_flight": settings.in_flight, "direct": False}
        if settings.device.type == "cuda":
            pinned = PinnedCopy(source, settings.in_flight)
            machine: Machine = pinned.move
            target, plain, engine, depth = (CUDA_TARGET, "cudaMemcpyAsync"), None, "pinned", settings.in_flight
        else:
            plain = PlainCopy(source)
            machine = partial(_plain_pass, plain)
            target, engine, depth = (HOST_TARGET, "a plain copy"), "memcpy", None
        config |= {"engine": engine, "machine": target[1]}
        bed = Bed(f"host/{engine}", Medium.host, settings.host_bytes, traffic, machine, target, config)
        bed.plain, bed.machine_depth = plain, depth
        yield from _measured(bed, settings, until_s)


def _plain_pass(plain: PlainCopy, direction: Direction, block_bytes: int, num_bytes: int) -> Pass:
    """The same large copy for every direction and block size."""
    return plain.move(num_bytes)


@dataclass(frozen=True)
class Drive:
    """What every engine of the drive is measured with.

    Args:
        fio: None where there is none.
        plain: of host memory, for the overlap on CPU; None elsewhere.
    """

    folder: Path
    direct: DirectMode
    source: torch.Tensor
    fio: Fio | None
    plain: PlainCopy | None


def _ssd_beds(settings: Settings, until_s: float) -> Iterator[Row]:
    fio, direct = None, settings.direct
    try:
        fio = find_fio(settings.fio)
    except MachineError as error:
        yield Row("ssd/fio", error=str(error))
    with scratch_folder(settings.folder) as folder:
        probe = probe_direct(folder)
        if direct is DirectMode.on and not probe.direct:
            direct = DirectMode.off
            yield Row(
                "ssd/direct",
                config={"folder": settings.folder, "file_system": file_system(folder)},
                error=f"no O_DIRECT here ({probe.why}): ours and fio's bytes go through the page cache; give "
                "folder=DIR on a local drive",
            )
        source = random_bytes(settings.ssd_bytes, settings.device)
        plain = PlainCopy(source) if settings.device.type == "cpu" and settings.overlap else None
        drive = Drive(folder, direct, source, fio, plain)
        for number, engine in enumerate(settings.engines):
            share_s = _share_of_time(until_s, len(settings.engines) - number)
            yield from _ssd_bed(settings, engine, drive, share_s)


def _ssd_bed(settings: Settings, engine: SsdEngine, drive: Drive, until_s: float) -> Iterator[Row]:
    """Ours with and without checksum and fio's take turns on one range of one file.

    Ranges of their own would not do: a drive, a virtual one above all, is not equally fast everywhere.
    """
    name, num_bytes = f"ssd/{engine.value}", settings.ssd_bytes
    with ExitStack() as undo:
        slab = undo.enter_context(SsdSlab(drive.folder, num_bytes, direct=drive.direct))
        lease = slab.lease("bench", num_bytes)
        try:
            traffic = _open_traffic(undo, settings, dict.fromkeys(VARIANTS, lease), drive.source, engine)
        except MachineError as error:
            if engine is not SsdEngine.gds or settings.engine is not SsdEngine.auto:
                raise
            # It was not requested by name, so its absence is a valid result.
            yield Row(name, {"real": 0}, {"engine": engine.value, "why": str(error)})
            return
        config: dict[str, object] = {
            "device": str(settings.device),
            "engine": engine.value,
            "in_flight": settings.in_flight,
            "num_threads": settings.num_threads,
            "direct": lease.direct,
            "direct_why": slab.direct_why,
            "file_system": file_system(drive.folder),
        }
        machine: Machine | None = None
        # A thread that prefers the other direction helps out, so that every thread moves a part.
        depth = 2 * settings.num_threads
        if drive.fio is not None:
            config["machine"] = f"{drive.fio.version}, the best of: {'; '.join(map(str, drive.fio.settings))}"
            machine = partial(_fio_pass, drive.fio, lease, depth)
            # Ours is written once before the first case too.
            machine(Direction.store, min(TARGET_FROM_BYTES, num_bytes), num_bytes)
        bed = Bed(name, Medium.ssd, num_bytes, traffic, machine, (SSD_TARGET, "fio"), config, shared=True)
        bed.plain, bed.machine_depth = drive.plain, depth if machine is not None else None
        bed.setting = None if drive.fio is None else drive.fio.setting_of
        bed.cached_pages = partial(cached_pages, lease.path, lease.offset_bytes, lease.num_bytes)
        yield from _measured(bed, settings, until_s)


def _fio_pass(fio: Fio, lease: Lease, depth: int, direction: Direction, block_bytes: int, num_bytes: int) -> Pass:
    where = FileRange(lease.path, lease.offset_bytes, num_bytes, lease.direct)
    return fio.move(where, direction, block_bytes, depth)


def _open_traffic(
    undo: ExitStack, settings: Settings, leases: Mapping[str, Lease], source: torch.Tensor, engine: SsdEngine
) -> dict[str, TierTraffic]:
    """A stack per variant, closed by `undo`."""
    opened = {}
    for variant, lease in leases.items():
        ssd = SsdTierConfig(engine=engine, required=engine is not SsdEngine.auto, num_threads=settings.num_threads)
        config = TiersConfig(ssd=ssd, checksum=VARIANTS[variant])
        stack = open_stack([lease], config, device=settings.device, log=TransferLog())
        undo.callback(stack.close)
        opened[variant] = TierTraffic(stack, lease.medium, source, settings.in_flight)
    return opened
