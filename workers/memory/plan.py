"""The memory plan: where every skeletal tensor of every block lives, per stretch of tokens. No torch.

It is solved in platform/planning or made by a preset (presets.py), and obeyed by the sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any

from headrace.kernels.codecs.config import CodecName
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.rebuild import Spans, merge
from headrace.workers.model.head_groups import grouped
from headrace.workers.model.skeleton import Kind, Reach, Skeleton, Span

SCHEMA_VERSION = 3
DEFAULT_TOKEN_TILE = 512


class Residence(StrEnum):
    """Where a stretch of a skeletal tensor lives between forward and backward."""

    hbm = "hbm"
    host = "host"
    ssd = "ssd"
    recompute = "recompute"

    @property
    def medium(self) -> Medium | None:
        """The tier it is moved to; None where nothing moves."""
        return Medium(self.value) if self in (Residence.host, Residence.ssd) else None


class Sweep(StrEnum):
    """Which loop is outside: over layers, or over token chunks."""

    by_layer = "by_layer"
    by_chunk = "by_chunk"


@dataclass(frozen=True)
class Cuts:
    """Where the sweep cuts the tokens. Cuts change the order of sums, so equal bits need equal cuts.

    Args:
        token_tile: tokens that the token segments of a block (norms, projections, MLP) work on at once.
        query_tile: queries per call of attention's forward; None: all at once. A plan that recomputes a part of
            attention's output needs one, so that the part is computed as it was in forward.
        chunks: sizes of the chunks that pass through all layers in turn, the last one repeated to the end of the row;
            empty where a layer handles the whole row.
        kv_block: tokens of a KV block of the sweep by chunk.
        head_groups: groups of KV heads, with their query heads, that attention runs one after another; sweep by layer.
        codec: in which the tensors that are placed tile by tile are held, wherever that is. Lossy; sweep by layer.
    """

    token_tile: int = DEFAULT_TOKEN_TILE
    query_tile: int | None = None
    chunks: tuple[int, ...] = ()
    kv_block: int | None = None
    head_groups: int = 1
    codec: CodecName | None = None

    def skeletons(self, blocks: Iterable[Skeleton]) -> list[Skeleton]:
        """Those of blocks, cut into the head groups and with the codec. Raises InputError as `grouped`."""
        return [_coded(grouped(skeleton, self.head_groups), self.codec) for skeleton in blocks]

    def tiles(self, num_tokens: int) -> list[Span]:
        """The token tiles, the last one ragged."""
        return _cut(num_tokens, self.token_tile)

    def chunk_spans(self, num_tokens: int) -> list[Span]:
        """The chunks of a row, the last one ragged; the whole row where the sweep is by layer."""
        spans: list[Span] = []
        sizes = iter(self.chunks or (num_tokens,))
        begin = size = 0
        while begin < num_tokens:
            size = next(sizes, size)
            spans.append((begin, min(begin + size, num_tokens)))
            begin += size
        return spans

    def longest_chunk(self, num_tokens: int) -> int:
        """Tokens of the longest chunk of a row."""
        return max(end - begin for begin, end in self.chunk_spans(num_tokens))

    def query_tiles(self, num_tokens: int) -> list[Span]:
        """The spans of queries, the last one ragged."""
        return _cut(num_tokens, self.query_tile or num_tokens)


@dataclass(frozen=True)
class Stretch:
    """Tokens [begin, end) of a tensor that live in one place; end None: to the end of the sequence."""

    begin: int
    end: int | None
    residence: Residence

    def span(self, num_tokens: int) -> Span:
        """Its tokens in a sequence of so many."""
        return min(self.begin, num_tokens), num_tokens if self.end is None else min(self.end, num_tokens)


@dataclass(frozen=True)
class LayerPlan:
    """One block: the stretches of its skeletal tensors. What is not named is recomputed.

    Raises:
        ValueError: stretches that overlap, leave a gap, or do not end with the sequence; names the tensor.
    """

    stretches: Mapping[str, tuple[Stretch, ...]]

    def __post_init__(self) -> None:
        for name, row in self.stretches.items():
            ends = [0, *(stretch.end for stretch in row)]
            begins = [*(stretch.begin for stretch in row), None]
            if ends != begins or any(s.end is not None and s.end <= s.begin for s in row):
                shown = ", ".join(f"[{s.begin}, {'end' if s.end is None else s.end})" for s in row)
                raise ValueError(
                    f"tensor {name}: its stretches {shown} must follow each other without gap or overlap from token 0 "
                    "to the end of the sequence (end=None)"
                )

    # Plans are looked up in caches by the planner, and by a block for every new length of rows.
    @cached_property
    def _hash(self) -> int:
        return hash(frozenset(self.stretches.items()))

    def __hash__(self) -> int:
        return self._hash

    # Another process has other hashes.
    def __reduce__(self) -> tuple[type[LayerPlan], tuple[Mapping[str, tuple[Stretch, ...]]]]:
        return LayerPlan, (self.stretches,)

    @classmethod
    def of(cls, **residences: Residence) -> LayerPlan:
        """Every named tensor in one place for all tokens."""
        return cls({name: (Stretch(0, None, residence),) for name, residence in residences.items()})

    def spans(self, name: str, num_tokens: int, *residences: Residence) -> Spans:
        """Tokens of a tensor that live in one of these places."""
        row = self.stretches.get(name, (WHOLE_RECOMPUTE,))
        return merge(stretch.span(num_tokens) for stretch in row if stretch.residence in residences)

    def held(self, num_tokens: int) -> dict[str, Spans]:
        """Spans of every tensor that is there again in backward without being computed, by name."""
        return {name: self.spans(name, num_tokens, *HELD) for name in self.stretches}

    def residence(self, name: str, token: int) -> Residence:
        """Where one token's row of a tensor lives."""
        for stretch in self.stretches.get(name, ()):
            if stretch.begin <= token and (stretch.end is None or token < stretch.end):
                return stretch.residence
        return Residence.recompute

    @cached_property
    def moves(self) -> bool:
        """Whether any stretch lives in a tier."""
        return any(stretch.residence.medium for row in self.stretches.values() for stretch in row)

    def on_device(self) -> LayerPlan:
        """The same with everything that it moves kept on the device."""
        return LayerPlan(
            {
                name: tuple(replace(s, residence=Residence.hbm) if s.residence.medium else s for s in row)
                for name, row in self.stretches.items()
            }
        )


WHOLE_RECOMPUTE = Stretch(0, None, Residence.recompute)
HELD = (Residence.hbm, Residence.host, Residence.ssd)


@dataclass(frozen=True)
class PagePlan:
    """Sweep by chunk: which pages of earlier KV blocks a chunk's attention reads. Lossy.

    Args:
        page: tokens of a page; a KV block holds whole pages.
        budget: pages that a chunk reads of earlier KV blocks, per layer and row, `sink` and `recent` among them.
        sink: first pages of the document, always read.
        recent: last pages of those, always read.
    """

    page: int
    budget: int
    sink: int = 0
    recent: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """The whole plan of one rank.

    Args:
        name: preset or "auto".
        layers: one entry per decoder block, in forward order.
        cuts: where tokens are cut.
        prefetch_layers: loads run at most so many blocks' bytes ahead of backward.
        predicted: what the planner expects, by metric name; the run records it beside what it measured.
        kv / kv_grads: sweep by chunk: where the KV blocks and their gradients live, by token of the row.
        gathered_layers: sweep by chunk: so many first blocks keep their weights gathered from chunk to chunk.
        pages: sweep by chunk: which pages attention reads; None: all of them.
        solver: what found the plan, where it was solved for.
    """

    name: str
    layers: tuple[LayerPlan, ...]
    sweep: Sweep = Sweep.by_layer
    cuts: Cuts = Cuts()
    prefetch_layers: int = 1
    predicted: Mapping[str, float] = field(default_factory=dict)
    kv: tuple[Stretch, ...] = ()
    kv_grads: tuple[Stretch, ...] = ()
    gathered_layers: int = 0
    pages: PagePlan | None = None
    solver: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, the content of plan.json: a table of layer plans and an index into it per layer."""
        table: list[LayerPlan] = []
        for layer in self.layers:
            if layer not in table:
                table.append(layer)
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "sweep": self.sweep.value,
            "cuts": {**asdict(self.cuts), "chunks": list(self.cuts.chunks)},
            "prefetch_layers": self.prefetch_layers,
            "table": [{name: _as_lists(row) for name, row in layer.stretches.items()} for layer in table],
            "layers": [table.index(layer) for layer in self.layers],
            "kv": _as_lists(self.kv),
            "kv_grads": _as_lists(self.kv_grads),
            "gathered_layers": self.gathered_layers,
            "pages": None if self.pages is None else asdict(self.pages),
            "solver": self.solver,
            "predicted": dict(self.predicted),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryPlan:
        """Inverse of to_dict. Raises KeyError or ValueError on a file that is not a plan of this schema."""
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"a plan of schema {data['schema_version']}: this version reads {SCHEMA_VERSION}")
        table = [LayerPlan({name: _of_lists(row) for name, row in layer.items()}) for layer in data["table"]]
        return cls(
            name=data["name"],
            layers=tuple(table[index] for index in data["layers"]),
            sweep=Sweep(data["sweep"]),
            cuts=_cuts_of(data["cuts"]),
            prefetch_layers=int(data["prefetch_layers"]),
            predicted=dict(data.get("predicted", {})),
            kv=_of_lists(data["kv"]),
            kv_grads=_of_lists(data["kv_grads"]),
            gathered_layers=int(data["gathered_layers"]),
            pages=None if data.get("pages") is None else PagePlan(**data["pages"]),
            solver=data.get("solver", ""),
        )

    def of_layers(self, layers: Iterable[int]) -> MemoryPlan:
        """The plan of some of the blocks."""
        return replace(self, layers=tuple(self.layers[layer] for layer in layers))

    def keep_twin(self, skeletons: Sequence[Skeleton]) -> MemoryPlan:
        """The plan with the same cuts that keeps every skeletal tensor on the device: it computes the same bits."""
        layers = tuple(keep_layer(skeleton) for skeleton in self.cuts.skeletons(skeletons))
        kept = tuple(() if not row else ALL_HBM for row in (self.kv, self.kv_grads))
        name = f"keep ({self.name})"
        return replace(self, name=name, layers=layers, predicted={}, kv=kept[0], kv_grads=kept[1])

    @property
    def media(self) -> frozenset[Medium]:
        """The tiers that it uses."""
        rows = [row for layer in self.layers for row in layer.stretches.values()] + [self.kv, self.kv_grads]
        return frozenset(s.residence.medium for row in rows for s in row if s.residence.medium is not None)


@lru_cache(maxsize=64)
def _coded(skeleton: Skeleton, codec: CodecName | None) -> Skeleton:
    return skeleton if skeleton.codec is codec else replace(skeleton, codec=codec)


def _cuts_of(data: Mapping[str, Any]) -> Cuts:
    codec = data.get("codec")
    return Cuts(**{**data, "chunks": tuple(data["chunks"]), "codec": None if codec is None else CodecName(codec)})


ALL_HBM = (Stretch(0, None, Residence.hbm),)


def keep_layer(skeleton: Skeleton) -> LayerPlan:
    """Every skeletal tensor stays on the device."""
    return LayerPlan.of(**dict.fromkeys(skeleton.skeletal, Residence.hbm))


def input_layer(skeleton: Skeleton, residence: Residence) -> LayerPlan:
    """The block's input, and the states of its scans, wait in one place; all else runs again from them."""
    return LayerPlan.of(**dict.fromkeys(skeleton.inputs, residence))


def _as_lists(row: Sequence[Stretch]) -> list[list[Any]]:
    return [[s.begin, s.end, s.residence.value] for s in row]


def _of_lists(row: Sequence[Sequence[Any]]) -> tuple[Stretch, ...]:
    return tuple(Stretch(begin, end, Residence(residence)) for begin, end, residence in row)


def _cut(num_tokens: int, tile: int) -> list[Span]:
    return [(begin, min(begin + tile, num_tokens)) for begin in range(0, num_tokens, tile)]


def check_plan(plan: MemoryPlan, skeletons: Sequence[Skeleton]) -> None:
    """Refuse a plan that does not fit the blocks.

    Raises:
        InputError: another number of layers; head groups that do not divide the KV heads; a tensor that the block does
            not have; a block input or the state of a scan that would be recomputed; a stretch that does not begin and
            end at a tile.
    """
    _check_chunks(plan)
    if len(plan.layers) != len(skeletons):
        raise InputError(f"the plan {plan.name!r} has {len(plan.layers)} layers, the model has {len(skeletons)} blocks")
    for layer, (row, skeleton) in enumerate(zip(plan.layers, plan.cuts.skeletons(skeletons), strict=True)):
        where = f"the plan {plan.name!r}, layer {layer}"
        if stray := row.stretches.keys() - set(skeleton.skeletal):
            raise InputError(f"{where}: tensors {sorted(stray)}: the block has {', '.join(skeleton.skeletal)}")
        for name in skeleton.inputs:
            if any(s.residence is Residence.recompute for s in row.stretches.get(name, (WHOLE_RECOMPUTE,))):
                what = "the block's input" if name == skeleton.root.name else "the state of a scan"
                raise InputError(f"{where}: {name} is {what} and cannot be recomputed: choose hbm, host or ssd")
        for name, stretches in row.stretches.items():
            tile = _tile_of(name, skeleton, plan.cuts)
            if tile is None and len(stretches) > 1:
                raise InputError(f"{where}: {name} has several stretches and is made at once: choose one place for it")
            if tile is None:
                continue
            if off := [s.end for s in stretches if s.end is not None and s.end % tile]:
                raise InputError(f"{where}: {name}: stretches end at {off}: choose multiples of {tile} tokens")


def _check_chunks(plan: MemoryPlan) -> None:
    """Refuse chunks, KV blocks and their places that do not fit together."""
    where, block = f"the plan {plan.name!r}", plan.cuts.kv_block
    if (plan.sweep is Sweep.by_chunk) != bool(plan.cuts.chunks):
        raise InputError(f"{where}: sweep {plan.sweep.value} with chunks {list(plan.cuts.chunks)}")
    if plan.sweep is Sweep.by_layer:
        if plan.pages is not None:
            raise InputError(f"{where}: sweep by_layer with pages: only the sweep by chunk reads some pages")
        return
    if plan.cuts.head_groups != 1:
        raise InputError(f"{where}: memory.head_groups={plan.cuts.head_groups} is of the sweep by layer; choose 1")
    if plan.cuts.codec is not None:
        raise InputError(f"{where}: memory.codec={plan.cuts.codec} is of the sweep by layer; set memory.codec=null")
    if block is None or block < 1 or min(plan.cuts.chunks) < 1:
        raise InputError(f"{where}: chunks {list(plan.cuts.chunks)} and KV blocks of {block}: at least 1 token each")
    for name, row in (("kv", plan.kv), ("kv_grads", plan.kv_grads)):
        LayerPlan({name: row})  # says what is wrong with stretches that do not follow each other
        if off := [s.end for s in row if s.end is not None and s.end % block]:
            raise InputError(f"{where}: {name}: stretches end at {off}: choose multiples of the KV block, {block}")
        places = [s.residence for s in row]
        if Residence.recompute in places or Residence.hbm in places[1:]:
            shown = ", ".join(place.value for place in places)
            raise InputError(f"{where}: {name}: {shown}: the oldest blocks live in hbm, later ones on host or ssd")
    if plan.pages is not None:
        _check_pages(plan.pages, plan.cuts, where)


def _check_pages(pages: PagePlan, cuts: Cuts, where: str) -> None:
    if pages.page < 1 or cuts.kv_block is None or cuts.kv_block % pages.page:
        raise InputError(f"{where}: pages of {pages.page} tokens: choose a divisor of the KV block, {cuts.kv_block}")
    if pages.sink < 0 or pages.recent < 0 or pages.budget < max(1, pages.sink + pages.recent):
        raise InputError(
            f"{where}: a budget of {pages.budget} pages with {pages.sink} sink and {pages.recent} recent ones: at "
            "least 1, and at least as many as these together"
        )
    if cuts.query_tile is not None:
        raise InputError(f"{where}: query_tile={cuts.query_tile}: pages are chosen for a whole chunk; choose None")


def _tile_of(name: str, skeleton: Skeleton, cuts: Cuts) -> int | None:
    """Where stretches of a tensor may end: at token tiles, those of attention's results at query tiles too."""
    maker = skeleton.maker.get(name)
    if maker is None:
        return cuts.token_tile if skeleton.segments[0].kind is not Kind.opaque else None
    if maker.kind is Kind.opaque:
        return None
    if maker.reach is not Reach.prefix:
        return cuts.token_tile
    return None if cuts.query_tile is None else math.lcm(cuts.query_tile, cuts.token_tile)
