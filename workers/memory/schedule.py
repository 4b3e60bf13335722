"""The order of a block's work under the sweep by layer, and the blobs that a plan makes of it. No torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from headrace.storage.core.ledger import PIECE_BYTES, round_up
from headrace.storage.core.records import Direction, Medium
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.rebuild import Rerun, Spans, rebuild, subtract
from headrace.workers.model.skeleton import Kind, Reach, Segment, Skeleton, Span

Group = tuple[Segment, ...]
# The source of a blob that leaves is released when so many more blocks have started.
STORES_IN_FLIGHT = 2


class Schedule:
    """What a skeleton says about the order of a block's work. Made once per program.

    Attributes:
        groups: runs of token segments and scans, and the other segments one by one, in forward order.
        crossing: for every group, the tensors that it makes and a later group reads or the block returns.
        still_read: for every segment, the names that later segments of its group read.
        later: for every group, the names that a later group reads, and the block's output.
        early: the tensors that backward must have before the last group's gradients: values that gradients need of
            attention, and products of the earlier groups, which must not run twice.
        last_mix: number of the last group whose tokens need others; -1 where there is none.
        before: for every group, those of `early` that are made again before its gradients. With head groups the results
            of attention come first, and what a group's attention needs just before its own gradients: of q, k and v
            only one group's are there at once.
        read_whole: tensors that attention reads on all tokens at once, in forward or for its gradient.
        moments: in forward order, the skeletal tensors that are placed at one moment: those of a tile as soon as their
            segment has run, whole ones when their group has. This order of names is that of a blob's pieces.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self.groups: list[Group] = list(skeleton.groups())
        self.crossing = [
            tuple(
                name
                for segment in group
                for name in segment.made
                if name == skeleton.result or any(name in s.takes for later in self.groups[i + 1 :] for s in later)
            )
            for i, group in enumerate(self.groups)
        ]
        reads = [{name for segment in group for name in segment.takes} for group in self.groups]
        self.still_read = {
            segment: frozenset(name for later in group[place:] for name in later.reads)
            for group in self.groups
            for place, segment in enumerate(group, 1)
        }
        self.later = [{skeleton.result}.union(*reads[i + 1 :]) for i in range(len(reads))]
        self._used_before = [
            frozenset(name for group in self.groups[:i] for s in group for name in (*s.reads, *s.needs))
            for i in range(len(self.groups))
        ]
        self.early = tuple(
            name
            for group, crossing in zip(self.groups[:-1], self.crossing[:-1], strict=True)
            for segment in group
            for name in segment.made
            if name in skeleton.wanted and (segment.kind is not Kind.pointwise or name in crossing)
        )
        self.last_mix = max((i for i, group in enumerate(self.groups) if _mixes(group)), default=-1)
        self._inner = [segment for group in self.groups[:-1] for segment in group]
        self.before = self._before()
        mixes = [segment for group in self.groups for segment in group if segment.reach is Reach.prefix]
        self.read_whole = frozenset(name for segment in mixes for name in (*segment.reads, *segment.needs))
        # Backward uses tensors of attention first, then the later segments' before the earlier ones'.
        early = [name for names in reversed(self.before) for name in names]
        order = [*early, *reversed([n for n in skeleton.skeletal if n not in self.early])]
        self.use = {name: place for place, name in enumerate(order)}
        self.moments = [moment for moment in self._moments() if moment.names]

    @cached_property
    def has_products(self) -> bool:
        """Whether a segment is linear."""
        return any(segment.kind is Kind.linear for group in self.groups for segment in group)

    def _moments(self) -> Iterator[Moment]:
        yield Moment((self.skeleton.root.name,), is_whole=True)
        for group in self.groups:
            made = {name for segment in group for name in segment.made}
            skeletal = [name for name in self.skeleton.skeletal if name in made]
            for segment in group:
                names = tuple(name for name in skeletal if name in segment.made and not self.is_whole(name))
                yield Moment(names, is_whole=False)
            yield Moment(tuple(name for name in skeletal if self.is_whole(name)), is_whole=True)

    def _before(self) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = [()] * len(self.groups)
        found[-1] = self.early
        if self.skeleton.head_groups > 1:
            maker, groups = self.skeleton.maker, self.groups
            found[-1] = tuple(name for name in self.early if maker[name].reach is Reach.prefix)
            for index in (i for i, group in enumerate(groups) if group[0].reach is Reach.prefix):
                found[index] = tuple(name for name in self.early if maker[name] in groups[index - 1])
        return found

    def again(self, names: Sequence[str], held: Mapping[str, Spans], span: Span) -> Again:
        """How `names`, of one entry of `before`, are made again on these tokens."""
        if not names:
            return Again((), frozenset(), frozenset())
        segments = self._inner
        lacking = {name for name in names if subtract((span,), held.get(name, ()))}
        mixes = [s for s in segments if s.reach is Reach.prefix and lacking.intersection(s.made)]
        reads = {name for segment in mixes for name in segment.reads}
        runs = rebuild(segments, held, dict.fromkeys((*names, *sorted(reads.difference(names))), (span,)))
        spent = {name for name in reads.difference(names) if not held.get(name)}
        return Again(runs, frozenset((*names, *reads)), frozenset(spent))

    def used_before(self, group: int) -> frozenset[str]:
        """Tensors whose values the gradients of the groups before this one may take."""
        return self._used_before[group]

    def is_whole(self, name: str) -> bool:
        """Whether the tensor is placed for all tokens at once, not tile by tile."""
        maker = self.skeleton.maker.get(name)
        if maker is None or maker.reach is Reach.prefix:
            return True
        return any(name in names for names in self.crossing)


@lru_cache(maxsize=256)
def schedule_of(skeleton: Skeleton) -> Schedule:
    """One for every skeleton."""
    return Schedule(skeleton)


@lru_cache(maxsize=1024)
def made_again(schedule: Schedule, plan: LayerPlan, num_tokens: int) -> tuple[Again, ...]:
    """For every group, what is made again before its gradients, because the plan does not hold it."""
    span, held, found = (0, num_tokens), dict(plan.held(num_tokens)), list[Again]()
    for names in reversed(schedule.before):
        again = schedule.again(names, held, span)
        held |= dict.fromkeys(again.stays, (span,))
        found.append(again)
    return tuple(reversed(found))


@lru_cache(maxsize=4096)
def tile_reruns(schedule: Schedule, plan: LayerPlan, group: Group, num_tokens: int, tile: Span) -> frozenset[Segment]:
    """The segments of a group that run again on a tile, once what backward must have before it is there."""
    return frozenset(run.segment for run in _reruns(schedule, plan, group, num_tokens, tile))


def all_reruns(schedule: Schedule, plan: LayerPlan, num_tokens: int) -> Iterator[Rerun]:
    """What backward runs again, in its order."""
    agains = made_again(schedule, plan, num_tokens)
    for again, group in zip(reversed(agains), reversed(schedule.groups), strict=True):
        yield from again.runs
        if group[0].reach is not Reach.prefix:
            yield from _reruns(schedule, plan, group, num_tokens, (0, num_tokens))


def tiles_again(schedule: Schedule, plan: LayerPlan, cuts: Cuts, num_tokens: int) -> list[Span]:
    """The tiles of queries whose attention backward runs again, because its results go."""
    spans = [run.span for run in all_reruns(schedule, plan, num_tokens) if run.segment.reach is Reach.prefix]
    tiles = cuts.query_tiles(num_tokens)
    return [tile for tile in tiles if any(begin < tile[1] and tile[0] < end for begin, end in spans)]


def _reruns(schedule: Schedule, plan: LayerPlan, group: Group, num_tokens: int, span: Span) -> tuple[Rerun, ...]:
    wanted = dict.fromkeys((name for segment in group for name in segment.needs), (span,))
    held = {**plan.held(num_tokens), **dict.fromkeys(schedule.early, ((0, num_tokens),))}
    return rebuild(group, held, wanted)


def _mixes(group: Group) -> bool:
    return any(segment.reach is not Reach.token for segment in group)


@lru_cache(maxsize=1024)
def outside(group: Group) -> tuple[str, ...]:
    """What a group reads and does not make."""
    made = {name for segment in group for name in segment.made}
    return tuple(dict.fromkeys(name for segment in group for name in segment.reads if name not in made))


class Again(NamedTuple):
    """How tensors that backward needs are made again.

    Args:
        runs: what runs, in order. Attention that runs again reads whole tensors.
        kept: tensors of which made rows are held.
        spent: those that only attention reads and nothing held before: dropped behind it, and made again when they are
            needed.
    """

    runs: tuple[Rerun, ...]
    kept: frozenset[str]
    spent: frozenset[str]

    @property
    def stays(self) -> frozenset[str]:
        """Tensors that are held on all tokens from then on."""
        made = {name for run in self.runs for name in run.segment.made}
        return self.kept.intersection(made) - self.spent


class Moment(NamedTuple):
    """Tensors that are placed at one moment, for all tokens or for a tile."""

    names: tuple[str, ...]
    is_whole: bool


class BlobSpec(NamedTuple):
    """One blob that a plan sends to a tier: these tokens of one or several tensors."""

    names: tuple[str, ...]
    span: Span
    medium: Medium

    @property
    def name(self) -> str:
        """Its name in keys, for example "out+lse"."""
        return "+".join(self.names)

    def num_bytes(self, skeleton: Skeleton, batch_size: int, itemsize: int) -> int:
        """Exact, with the gaps between its pieces."""
        end = 0
        for tensor in (skeleton.tensors[name] for name in self.names):
            rows = batch_size * tensor.num_rows(self.span)
            end = round_up(end, PIECE_BYTES) + rows * skeleton.held_bytes(tensor.name, itemsize)
        return end


class Placing(NamedTuple):
    """Of tensors that are placed at one moment: what stays on the device, on which tokens, and the blobs."""

    stays: tuple[tuple[str, Span], ...]
    blobs: tuple[BlobSpec, ...]


def placed(plan: LayerPlan, name: str, span: Span, num_tokens: int) -> Iterator[tuple[Span, Residence]]:
    """The parts of a span of a tensor that the plan places somewhere; the others are dropped."""
    for stretch in plan.stretches.get(name, ()):
        low, high = stretch.span(num_tokens)
        part = max(low, span[0]), min(high, span[1])
        if part[0] < part[1] and stretch.residence is not Residence.recompute:
            yield part, stretch.residence


def placing(plan: LayerPlan, names: tuple[str, ...], span: Span, num_tokens: int) -> Placing:
    """Where the plan puts tensors that are placed at one moment on these tokens."""
    parts = ((name, *at) for name in names for at in placed(plan, name, span, num_tokens))
    stays = tuple((name, part) for name, part, residence in parts if residence.medium is None)
    return Placing(stays, tuple(blobs_at(plan, names, span, num_tokens)))


def blobs_at(plan: LayerPlan, names: Iterable[str], span: Span, num_tokens: int) -> list[BlobSpec]:
    """The blobs of tensors that are placed at one moment on these tokens.

    Tensors that one place takes on the whole span are one blob: one store, one load, one I/O of the drive. A part of
    the span is a blob of its own, because it is loaded into its rows of the whole tensor.
    """
    together: dict[Medium, tuple[str, ...]] = {}
    found: list[BlobSpec] = []
    for name in names:
        for part, residence in placed(plan, name, span, num_tokens):
            if residence.medium is None:
                continue
            if part == span:
                together[residence.medium] = (*together.get(residence.medium, ()), name)
            else:
                found.append(BlobSpec((name,), part, residence.medium))
    return [*(BlobSpec(share, span, medium) for medium, share in together.items()), *found]


def counted_blobs(plan: LayerPlan, cuts: Cuts, schedule: Schedule, num_tokens: int) -> Iterator[tuple[BlobSpec, int]]:
    """The blobs of one block, as the layer sweep makes them: one of each run of tiles that are alike, and how many."""
    whole = [[(0, num_tokens)]]
    runs = alike(plan, cuts.tiles(num_tokens))
    for names, is_whole in schedule.moments:
        for run in whole if is_whole else runs:
            for blob in blobs_at(plan, names, run[0], num_tokens):
                yield blob, len(run)


def alike(plan: LayerPlan, tiles: Sequence[Span]) -> list[Sequence[Span]]:
    """Runs of neighbouring tiles of one length that the plan treats alike; tiles ascend or descend.

    No stretch ends within a tile (check_plan).
    """
    ends = sorted({s.end for row in plan.stretches.values() for s in row if s.end is not None})
    runs: list[Sequence[Span]] = []
    begin = 0
    while begin < len(tiles):
        first = tiles[begin]
        place, length = bisect_right(ends, first[0]), first[1] - first[0]
        low, high = begin, len(tiles)
        # The last tile of the run: places and lengths change once along the tiles.
        while high - low > 1:
            middle = (low + high) // 2
            tile = tiles[middle]
            if bisect_right(ends, tile[0]) == place and tile[1] - tile[0] == length:
                low = middle
            else:
                high = middle
        end = low + 1
        runs.append(tiles[begin:end])
        begin = end
    return runs


def num_forwarded(prefetch_layers: int, *, with_norm: bool) -> int:
    """How many of the last blocks move no byte back: their stores are not complete when backward needs the blobs.

    Args:
        prefetch_layers: of the plan.
        with_norm: the final norm runs as one more block, which leaves no blob.
    """
    return min(STORES_IN_FLIGHT, 1 + prefetch_layers) - with_norm


def moved_bytes(
    plan: MemoryPlan,
    skeletons: Sequence[Skeleton],
    *,
    batch_size: int,
    num_tokens: int,
    itemsize: int,
    round_to: int = 1,
    direction: Direction = Direction.store,
    with_norm: bool = True,
) -> dict[Medium, int]:
    """Bytes that one micro-batch of one rank stores to each tier, or loads from it.

        bytes[tier] = batch_size x the sum over blocks, tensors and stretches in that tier of tokens x bytes per token
                      + the gaps between the pieces of a blob

    Loads leave out the last blocks (num_forwarded): their sources answer the loads.

    Args:
        skeletons: of every block in forward order.
        num_tokens: T, of a row.
        itemsize: bytes of the compute dtype.
        round_to: every blob counts as a multiple of this; PAGE_BYTES gives what the slabs are filled with.
        with_norm: see num_forwarded.
    """
    moved = {Medium.host: 0, Medium.ssd: 0}
    moving = list(zip(plan.layers, plan.cuts.skeletons(skeletons), strict=True))
    if direction is Direction.load:
        moving = moving[: max(0, len(moving) - num_forwarded(plan.prefetch_layers, with_norm=with_norm))]
    for layer, skeleton in moving:
        for blob, number in counted_blobs(layer, plan.cuts, schedule_of(skeleton), num_tokens):
            moved[blob.medium] += number * round_up(blob.num_bytes(skeleton, batch_size, itemsize), round_to)
    return moved
