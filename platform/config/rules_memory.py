"""Rules of memory presets, tiers and records. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.platform.config.schema import RunConfig
from headrace.workers.memory.config import KvPlace, MemoryPreset
from headrace.workers.parallel.row_cut import chunk_problems

Problems = Iterator[str]


def budgets_within_hardware(config: RunConfig) -> Problems:
    """A budget above what the machine has is an error."""
    hardware, tiers = config.hardware, config.tiers
    for key, budget, there in (
        ("tiers.device.budget_gib", tiers.device.budget_gib, hardware.device_memory_gib),
        ("tiers.host.budget_gib", tiers.host.budget_gib, hardware.host_gib),
        ("tiers.ssd.budget_gib", tiers.ssd.budget_gib, hardware.ssd_gib),
    ):
        if budget is not None and there is not None and budget > there:
            other = ", or tiers.ssd.path on a drive with more room" if key == "tiers.ssd.budget_gib" else ""
            yield f"{key}={budget:g}: hardware={hardware.name} has {there:g} GiB; lower it, or leave it out{other}"


def growing_memory_has_a_budget(config: RunConfig) -> Problems:
    """Facts that the machine cannot measure must be configured."""
    if config.tiers.host.memory_grows and config.tiers.host.budget_gib is None:
        yield "tiers.host.memory_grows=true: how far it grows cannot be measured; set tiers.host.budget_gib too"


def presets_have_their_tier(config: RunConfig) -> Problems:
    """An offload preset needs the tier it offloads to."""
    preset = config.memory.preset
    if preset is MemoryPreset.chunk_sparse:
        place = config.memory.sparse.place
        budgets = {KvPlace.host: config.tiers.host.budget_gib, KvPlace.ssd: config.tiers.ssd.budget_gib}
        if budgets.get(place) == 0:
            yield (
                f"memory.sparse.place={place.value}: tiers.{place.value}.budget_gib=0 switches that tier off; raise "
                "it, leave it out, or choose another place"
            )
    for name, wanted, budget in (
        ("host", (MemoryPreset.offload_host, MemoryPreset.chunk_host), config.tiers.host.budget_gib),
        ("ssd", (MemoryPreset.offload_ssd, MemoryPreset.chunk_ssd), config.tiers.ssd.budget_gib),
    ):
        if preset in wanted and budget == 0:
            yield f"memory={preset.value}: tiers.{name}.budget_gib=0 switches that tier off; raise it or leave it out"


def eviction_has_a_drive(config: RunConfig) -> Problems:
    """What is evicted from the host goes to the drive."""
    if config.tiers.host.evict and config.tiers.ssd.budget_gib == 0:
        yield "tiers.host.evict=True: tiers.ssd.budget_gib=0 leaves no drive to evict to; raise it or leave it out"


def chunk_size_has_its_sweep(config: RunConfig) -> Problems:
    """A chunk belongs to the sweep by chunk; ranks that share rows or weights share it evenly."""
    size, preset = config.chunk_size, config.memory.preset
    if size is not None and size < 1:
        yield f"chunk_size={size}: at least 1 token, or leave it out"
    if size is not None and not preset.is_by_chunk:
        by_chunk = ", ".join(f"memory={p.value}" for p in MemoryPreset if p.is_by_chunk)
        yield f"chunk_size={size}: memory={preset.value} has no chunks; choose {by_chunk}, or leave chunk_size out"
    if not preset.is_by_chunk:
        return
    degrees = {name: max(1, getattr(config.parallel, name)) for name in ("tensor", "ulysses", "ring", "pipeline")}
    sizes = [] if size is None or not 1 <= size < config.data.seq_len else [size]
    yield from chunk_problems(f"memory={preset.value}", degrees, sizes=sizes, has_pages=preset.is_lossy)


def codec_fits(config: RunConfig) -> Problems:
    """A codec holds rows of plans by layer."""
    codec, preset = config.memory.codec, config.memory.preset
    if codec is not None and preset.is_by_chunk:
        yield f"memory.codec={codec.value}: memory={preset.value} runs by chunk, without a codec; set memory.codec=null"


def pages_fit(config: RunConfig) -> Problems:
    """Page-sparse attention: pages, chunks and budget fit together."""
    sparse, size = config.memory.sparse, config.chunk_size
    if config.memory.preset is not MemoryPreset.chunk_sparse:
        return
    if sparse.budget < sparse.sink + sparse.recent:
        yield (
            f"memory.sparse.budget={sparse.budget}: sink={sparse.sink} and recent={sparse.recent} pages are always "
            f"read; raise the budget to at least {sparse.sink + sparse.recent}, or lower these"
        )
    if size is not None and sparse.page >= 1 and size % sparse.page:
        yield f"memory.sparse.page={sparse.page}: does not divide chunk_size={size}; choose one that does"
    if config.model.sliding_window is not None:
        yield (
            f"memory=chunk_sparse: model.sliding_window={config.model.sliding_window} bounds what attention reads "
            "already; choose memory=chunk_host"
        )
    if sparse.compare_every > 0 and config.data.eval_fraction == 0:
        yield (
            f"memory.sparse.compare_every={sparse.compare_every}: data.eval_fraction=0 holds no rows out for the "
            "comparison with dense attention; raise it, or set memory.sparse.compare_every=0"
        )


def records_can_be_used(config: RunConfig) -> Problems:
    """A record of a half-done step is of use where its blobs stay, and the weights before the step are saved."""
    every, preset = config.checkpoint.every_chunks, config.memory.preset
    if every < 1:
        return
    key = f"checkpoint.every_chunks={every}"
    if not preset.is_by_chunk:
        by_chunk = ", ".join(f"memory={p.value}" for p in MemoryPreset if p.is_by_chunk)
        yield (
            f"{key}: memory={preset.value}: a step by layer has no chunks; choose {by_chunk}, or set "
            "checkpoint.every_chunks=0"
        )
    if config.checkpoint.every != 1:
        yield (
            f"{key}: checkpoint.every={config.checkpoint.every}: a step goes on only from a checkpoint of the step "
            "before it; set checkpoint.every=1, or checkpoint.every_chunks=0"
        )
    if not config.tiers.checksum:
        yield f"{key}: tiers.checksum=False: nothing would tell a damaged blob; set tiers.checksum=true"
    if config.tiers.host.evict:
        yield f"{key}: tiers.host.evict=True moves blobs from where a record says they are; set tiers.host.evict=false"
