"""Presets: functions from the skeletons of a model's blocks to a plan. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset, SparseConfig
from headrace.workers.memory.plan import (
    Cuts,
    LayerPlan,
    MemoryPlan,
    PagePlan,
    Residence,
    Stretch,
    Sweep,
    input_layer,
    keep_layer,
)
from headrace.workers.model.skeleton import Kind, Reach, Skeleton, chunk_skeleton

DEFAULT_CHUNK = 4096
# MEMO never swaps the last two layers: their backward starts at once.
MEMO_KEPT_LAYERS = 2


@dataclass(frozen=True)
class Choices:
    """Numbers that presets take from a machine and a length. platform/planning/presets.py finds them.

    Args:
        seq_len: tokens of a row.
        host_fraction / ssd_fraction: memo: the share of the tokens whose tensors, beside the input and attention's
            results, wait on the host or on the SSD. The tokens before them are recomputed.
        inputs_on_ssd: memo: the share of the layers whose input and attention's results go to the SSD, not to the host.
        keeps_last: the last block's input stays where those of the others leave: its backward starts at once.
        kept_parts: ssdtrain: parts at the end of the model that stay on the device; every block has two, attention and
            MLP.
        chunk_size: sweep by chunk: tokens of a chunk, and of a KV block.
        keeps_chunk: sweep by chunk: every tensor of the chunk at hand stays on the device; else its MLP is recomputed.
        gathered_layers: sweep by chunk: so many first blocks keep their weights gathered between chunks; None: all.
        kv: chunk_auto: where KV blocks and their gradients live, by token; empty: all in HBM.
        sparse: chunk_sparse: which pages attention reads, and where they live.
    """

    seq_len: int = 0
    host_fraction: float = 0.0
    ssd_fraction: float = 0.0
    inputs_on_ssd: float = 0.0
    keeps_last: bool = True
    kept_parts: int = 2
    chunk_size: int = DEFAULT_CHUNK
    keeps_chunk: bool = True
    gathered_layers: int | None = None
    kv: tuple[Stretch, ...] = ()
    sparse: SparseConfig = field(default_factory=SparseConfig)


Preset = Callable[[Sequence[Skeleton], Choices, Cuts], tuple[LayerPlan, ...]]


def _keep(skeletons: Sequence[Skeleton], choices: Choices, cuts: Cuts) -> tuple[LayerPlan, ...]:
    """Every skeletal tensor of every block stays on the device."""
    return tuple(keep_layer(skeleton) for skeleton in skeletons)


def _input_in(residence: Residence) -> Preset:
    def layers(skeletons: Sequence[Skeleton], choices: Choices, cuts: Cuts) -> tuple[LayerPlan, ...]:
        """Blocks leave their input and run again from it."""
        rows = [input_layer(skeleton, residence) for skeleton in skeletons]
        return (*rows[:-1], rows[-1].on_device() if choices.keeps_last else rows[-1])

    return layers


def _memo(skeletons: Sequence[Skeleton], choices: Choices, cuts: Cuts) -> tuple[LayerPlan, ...]:
    """Input and attention's results leave; of the rest a share of the tokens leaves and the front is recomputed.

    MEMO (arXiv 2407.12117): layer input and attention output are always swapped, of everything else the fraction alpha
    of the tokens. Where host memory ends the SSD goes on.
    """
    num_away = max(0, len(skeletons) - MEMO_KEPT_LAYERS)
    rows = [
        _memo_layer(skeleton, choices, cuts, _takes_turn(layer, choices.inputs_on_ssd))
        for layer, skeleton in enumerate(skeletons[:num_away])
    ]
    return (*rows, *(keep_layer(skeleton) for skeleton in skeletons[num_away:]))


def _memo_layer(skeleton: Skeleton, choices: Choices, cuts: Cuts, input_on_ssd: bool) -> LayerPlan:
    always, others = memo_tensors(skeleton)
    tiles = cuts.tiles(choices.seq_len)
    num_host, num_ssd = (int(share * len(tiles) + 1e-9) for share in (choices.host_fraction, choices.ssd_fraction))
    counts = {
        Residence.recompute: len(tiles) - num_host - num_ssd,
        Residence.ssd: num_ssd,
        Residence.host: num_host,
    }
    row: list[Stretch] = []
    at = 0
    for residence, count in counts.items():
        if count > 0:
            at += count
            row.append(Stretch(row[-1].end or 0 if row else 0, at * cuts.token_tile, residence))
    row = [*row[:-1], replace(row[-1], end=None)] if row else [Stretch(0, None, Residence.recompute)]
    place = Residence.ssd if input_on_ssd else Residence.host
    return LayerPlan({**LayerPlan.of(**dict.fromkeys(always, place)).stretches, **dict.fromkeys(others, tuple(row))})


def memo_tensors(skeleton: Skeleton) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The skeletal tensors that MEMO always moves, and the others."""
    results = [name for segment in skeleton.segments if segment.kind is Kind.mix for name in segment.made]
    always = (skeleton.root.name, *results)
    return always, tuple(name for name in skeleton.skeletal if name not in always)


def _takes_turn(number: int, share: float) -> bool:
    """Whether item `number` is among the share of the items, spread evenly."""
    return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)


def _ssdtrain(skeletons: Sequence[Skeleton], choices: Choices, cuts: Cuts) -> tuple[LayerPlan, ...]:
    """The leading parts of the model send all their tensors to the SSD, the tail keeps them (arXiv 2408.10013)."""
    rows, num_parts = [], 2 * len(skeletons)
    for layer, skeleton in enumerate(skeletons):
        row: dict[str, Residence] = {}
        for part, names in enumerate(block_parts(skeleton)):
            is_kept = 2 * layer + part >= num_parts - choices.kept_parts
            row |= dict.fromkeys(names, Residence.hbm if is_kept else Residence.ssd)
        rows.append(LayerPlan.of(**row))
    return tuple(rows)


def _by_chunk(skeletons: Sequence[Skeleton], choices: Choices, cuts: Cuts) -> tuple[LayerPlan, ...]:
    """What a chunk leaves between its forward and its backward stays; of the MLP only where there is room for it.

    Attention's results always stay, so attention is not run again in backward.
    """
    rows = {}
    for skeleton in dict.fromkeys(map(chunk_skeleton, skeletons)):
        names = skeleton.skeletal if choices.keeps_chunk else block_parts(skeleton)[0]
        rows[skeleton] = LayerPlan.of(**dict.fromkeys(names, Residence.hbm))
    return tuple(rows[chunk_skeleton(skeleton)] for skeleton in skeletons)


def block_parts(skeleton: Skeleton) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The skeletal tensors of attention, the block's input among them, and those of the MLP. A foreign block is one."""
    if is_opaque(skeleton):
        return skeleton.skeletal, ()
    late = {name for segment in skeleton.segments[after_attention(skeleton) :] for name in segment.made}
    return (
        tuple(name for name in skeleton.skeletal if name not in late),
        tuple(name for name in skeleton.skeletal if name in late),
    )


def is_opaque(skeleton: Skeleton) -> bool:
    """Whether it is that of a foreign block."""
    return skeleton.segments[0].kind is Kind.opaque


def after_attention(skeleton: Skeleton) -> int:
    """Index of the first segment behind attention."""
    return 1 + max(i for i, segment in enumerate(skeleton.segments) if segment.reach is not Reach.token)


def alst_cuts(skeleton: Skeleton) -> Cuts:
    """Tiles of as many tokens as the model is wide, which is ALST's rule for its tiled MLP (arXiv 2506.13996)."""
    return Cuts(skeleton.root.width) if skeleton.root.width else Cuts()


PRESETS: Mapping[MemoryPreset, Preset] = {
    MemoryPreset.keep: _keep,
    MemoryPreset.recompute: _input_in(Residence.hbm),
    MemoryPreset.checkpoint: _input_in(Residence.hbm),
    MemoryPreset.offload_host: _input_in(Residence.host),
    MemoryPreset.offload_ssd: _input_in(Residence.ssd),
    MemoryPreset.alst: _input_in(Residence.host),
    MemoryPreset.memo: _memo,
    MemoryPreset.ssdtrain: _ssdtrain,
    MemoryPreset.chunk: _by_chunk,
    MemoryPreset.chunk_host: _by_chunk,
    MemoryPreset.chunk_ssd: _by_chunk,
    MemoryPreset.chunk_auto: _by_chunk,
    MemoryPreset.chunk_sparse: _by_chunk,
}
# Where keys and values of earlier chunks, and their gradients, live; see kv_place.
KV_PLACES: Mapping[MemoryPreset, Residence] = {
    MemoryPreset.chunk: Residence.hbm,
    MemoryPreset.chunk_host: Residence.host,
    MemoryPreset.chunk_ssd: Residence.ssd,
}


def kv_place(preset: MemoryPreset, sparse: SparseConfig) -> Residence:
    """Where keys and values of earlier chunks, and their gradients, live under a preset of the sweep by chunk."""
    if preset is MemoryPreset.chunk_sparse:
        return Residence(sparse.place.value)
    return KV_PLACES.get(preset, Residence.hbm)


# What a foreign block does not show, and the remedy.
NOT_FOREIGN: Mapping[MemoryPreset, str] = {
    MemoryPreset.memo: "places tensors by name and by token, and a foreign block shows neither; choose ssdtrain, or a "
    "plan with LayerPlan.of(x=Residence.host, saved=Residence.host)",
    **dict.fromkeys(
        [preset for preset in MemoryPreset if preset.is_by_chunk],
        "needs the keys and values of attention apart, and a foreign block does not show them; choose offload_host",
    ),
    MemoryPreset.alst: "runs the MLP in tiles of tokens, and a foreign block runs at once; choose offload_host, which "
    "moves the same tensors",
}


def preset_plan(
    preset: MemoryPreset | str,
    skeletons: Sequence[Skeleton],
    *,
    prefetch_layers: int = 1,
    cuts: Cuts | None = None,
    choices: Choices | None = None,
) -> MemoryPlan:
    """The plan of a preset.

    Args:
        cuts: None: those of the preset.
        choices: None: memo recomputes all that it may, ssdtrain keeps the last block.

    Raises:
        InputError: no such preset, one that is solved in platform/planning, or one that places tensors that a foreign
            block does not show.
    """
    names = ", ".join(p.value for p in PRESETS)
    try:
        preset = MemoryPreset(preset)
        layers = PRESETS[preset]
    except (ValueError, KeyError):
        value = preset.value if isinstance(preset, MemoryPreset) else preset
        raise InputError(f"memory={value}: not a plan that needs no solver; choose one of {names}") from None
    if preset in NOT_FOREIGN and any(is_opaque(s) for s in skeletons):
        raise InputError(f"memory={preset.value} {NOT_FOREIGN[preset]}")
    choices = choices or Choices()
    cuts = cuts or (alst_cuts(skeletons[0]) if preset is MemoryPreset.alst and skeletons else Cuts())
    rows = layers(cuts.skeletons(skeletons), choices, cuts)
    plan = MemoryPlan(preset.value, rows, cuts=cuts, prefetch_layers=prefetch_layers)
    if not preset.is_by_chunk:
        return plan
    # A KV block holds whole tokens of one chunk or of several: the same blocks wherever they live.
    block, pages, sparse = choices.chunk_size, None, choices.sparse
    if preset is MemoryPreset.chunk_sparse:
        if any(segment.state is not None for skeleton in skeletons for segment in skeleton.segments):
            raise InputError("memory=chunk_sparse: a layer that scans has no pages to choose; choose memory=chunk_host")
        page = min(sparse.page, block)  # short rows of data.buckets have short chunks
        block = -(-block // page) * page
        pages = PagePlan(page, sparse.budget, sparse.sink, sparse.recent)
    cuts = replace(cuts, chunks=(choices.chunk_size,), kv_block=block)
    places = choices.kv or (Stretch(0, None, kv_place(preset, sparse)),)
    plan = replace(plan, sweep=Sweep.by_chunk, cuts=cuts, kv=places, kv_grads=places, pages=pages)
    return replace(plan, gathered_layers=len(rows) if choices.gathered_layers is None else choices.gathered_layers)
