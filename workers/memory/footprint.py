"""Bytes on the device while one block runs under the sweep by layer: the walk of layer_sweep.py in numbers. No torch.

A step's peak is put together from these in platform/planning/predict.py; tests compare it with all live tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.workers.memory.head_bytes import WIDE_BYTES
from headrace.workers.memory.plan import Cuts, LayerPlan, Residence
from headrace.workers.memory.schedule import (
    Again,
    Group,
    Schedule,
    all_reruns,
    counted_blobs,
    made_again,
    outside,
    tile_reruns,
)
from headrace.workers.memory.walk import Live, Walk
from headrace.workers.model.skeleton import Kind, Reach, Segment, Span


@dataclass(frozen=True)
class Footprint:
    """One block of one micro-batch, in bytes.

    Args:
        forward / backward: most bytes of the block's own tensors at once: its input and output (in backward the
            gradients of both), what it holds, what it moves, and its parameters' gradients until it hands them over.
        beside_sums: as `backward`, where the gradients of earlier micro-batches are summed already, beside the sums.
        split: the same of a backward that leaves the gradients of weights for later, with what it leaves in the queue.
        held: on the device between forward and backward; the block's input is among it where it stays.
        queued: of `split`, what stays behind it: inputs of the gradients of weights.
        away: by tier, what leaves and comes back.
        slots: by tier, what that takes in a slab: every blob whole pages.
        rerun: what runs again in backward, with the tokens.
    """

    forward: int
    backward: int
    beside_sums: int
    split: int
    held: int
    queued: int
    away: dict[Medium, int]
    slots: dict[Medium, int]
    rerun: tuple[tuple[Segment, Span], ...]


@lru_cache(maxsize=1024)
def footprint(
    schedule: Schedule,
    plan: LayerPlan,
    cuts: Cuts,
    *,
    batch_size: int,
    num_tokens: int,
    itemsize: int,
    casts_products: bool,
    splits: bool = False,
) -> Footprint:
    """Of one block under a layer plan.

    Args:
        num_tokens: T, of a row.
        itemsize: bytes of the compute dtype.
        casts_products: the factors of a sum over tiles are cast to fp32 (kernels/products.py without CUDA).
        splits: whether gradients of weights come in a pass of their own; `split` and `queued` are 0 where they do not.
    """
    walk = Walk(
        *(schedule, plan, cuts),
        batch_size=batch_size,
        num_tokens=num_tokens,
        itemsize=itemsize,
        casts_products=casts_products,
    )
    names = schedule.skeleton.skeletal
    away, slots = (dict.fromkeys((Medium.host, Medium.ssd), 0) for _ in range(2))
    for blob, number in counted_blobs(plan, cuts, schedule, num_tokens):
        size = blob.num_bytes(schedule.skeleton, batch_size, itemsize)
        away[blob.medium] += number * size
        slots[blob.medium] += number * round_up(size)
    reruns = all_reruns(schedule, plan, num_tokens)
    # A pointwise segment runs again for its gradient whatever the plan; only products are counted as run again.
    products = tuple((run.segment, run.span) for run in reruns if run.segment.kind is not Kind.pointwise)
    back, segments = _backward(walk), [segment for segment in schedule.skeleton.segments if segment.needs]
    return Footprint(
        forward=_forward(walk),
        backward=back.peak,
        beside_sums=back.peak_beside_sums,
        split=_backward(walk, splits=True).peak if splits else 0,
        held=sum(walk.bytes_in(name, Residence.hbm) for name in names),
        queued=sum(_queued(walk, segment) for segment in segments) if splits else 0,
        away=away,
        slots=slots,
        rerun=products,
    )


def _queued(walk: Walk, segment: Segment) -> int:
    """x and dy of a linear segment; 0 for others."""
    if segment.kind is not Kind.linear:
        return 0
    names = (*(name for name in segment.reads if name != segment.adds), *segment.made)
    return sum(walk.size(name, walk.all) for name in names)


def _forward(walk: Walk) -> int:
    schedule, live = walk.schedule, Live()
    root = schedule.skeleton.root.name
    live.add(root, walk.size(root, walk.all))
    stays = {name for name in walk.plan.stretches if walk.places(name, walk.all) == walk.size(name, walk.all)}
    for index, group in enumerate(schedule.groups):
        if group[0].reach is Reach.prefix:
            for name in group[0].made:
                live.add(name, walk.size(name, walk.all))
            query_tile = walk.cuts.query_tiles(walk.num_tokens)[0]
            live.passing(walk.rows(group[0].workspace(walk.itemsize).run, query_tile))
            if query_tile == walk.all:
                live.passing(sum(walk.size(name, walk.all) for name in group[0].made if name in walk.together))
        else:
            # The states of scans that are handed on.
            live.add("handed on", sum(walk.state_bytes(segment) for segment in group))
            for piece in walk.pieces:
                if piece.is_between:
                    _placed(walk, live, group, piece.span, schedule.crossing[index])
                else:
                    _forward_tile(walk, live, group, piece.span, set(schedule.crossing[index]))
            live.drop(["handed on"])
        for name in (n for segment in group for n in segment.made if schedule.is_whole(n) and n not in stays):
            live.add(f"{name} placed", walk.bytes_in(name, Residence.hbm))
        live.drop(name for name in schedule.skeleton.tensors if name not in schedule.later[index] | stays)
    return live.peak


def _placed(walk: Walk, live: Live, group: Group, span: Span, crossing: Sequence[str]) -> None:
    """What tiles leave that are like the one before them."""
    for name in (name for segment in group for name in segment.made if name not in crossing):
        if walk.places(name, span):
            live.add(f"{name} {span} held" if name in walk.coded else f"{name} {span}", walk.held_size(name, span))


def _forward_tile(walk: Walk, live: Live, group: Group, tile: Span, crossing: set[str]) -> None:
    temporary: set[str] = set()
    for position, segment in enumerate(group):
        # Makes stand beside the workspace; what the workspace counts is gone when the segment is done.
        for name in segment.made:
            is_placed = walk.places(name, tile) > 0
            kept_here = name in crossing or (is_placed and name not in walk.coded)
            key = name if walk.is_single and name not in walk.together else f"{name} {tile}"
            live.add(key, walk.size(name, tile))
            if not kept_here or (key != name and name in crossing):
                temporary.add(key)
        live.passing(walk.rows(segment.workspace(walk.itemsize).run, tile))
        _encode(walk, live, segment, tile)
        live.passing(walk.copied([name for name in segment.made if name not in crossing], tile))
        for name in (name for name in segment.made if name in crossing):
            for other in walk.together.get(name, (name,)):
                live.add(other, walk.size(other, walk.all))
        read = {name for later in group[position + 1 :] for name in later.reads}
        gone = {key for key in temporary if key.split(" ")[0] not in read}
        live.drop(gone)
        temporary -= gone


def _encode(walk: Walk, live: Live, segment: Segment, tile: Span) -> None:
    """What a segment made goes into the codec where it is placed; it is dropped when nothing reads it any more."""
    for name in segment.made:
        if name in walk.coded and walk.places(name, tile):
            live.passing(walk.codec_bytes(name, tile)[0] + walk.held_size(name, tile))
            live.add(f"{name} {tile} held", walk.held_size(name, tile))


def _backward(walk: Walk, *, splits: bool = False) -> Live:
    schedule, live = walk.schedule, Live()
    skeleton = schedule.skeleton
    live.add("dy", walk.size(skeleton.result, walk.all))
    for name in skeleton.skeletal:
        for span in [walk.all] if schedule.is_whole(name) else [piece.span for piece in walk.pieces_back]:
            if num_bytes := walk.places(name, span):
                live.add(name if schedule.is_whole(name) else f"{name} {span}", num_bytes)
    agains = made_again(schedule, walk.plan, walk.num_tokens)
    for index in reversed(range(len(schedule.groups))):
        group = schedule.groups[index]
        _make_again(walk, live, agains[index])
        if group[0].reach is Reach.prefix:
            # Rows that were made again stand in a buffer of the whole tensor; held rows are copied there now.
            live.drop(name for name in group[0].needs if f"{name} again" in live)
            for name in group[0].takes:
                live.add(f"d{name}", walk.size(name, walk.all))
            live.drop([f"d{group[0].made[0]}"])
        else:
            inner = {name for segment in group for name in segment.made}
            live.add("handed back", sum(walk.state_bytes(segment) for segment in group))
            for piece in walk.pieces_back:
                if not piece.is_between:
                    _backward_tile(walk, live, group, piece.span, splits=splits)
                for segment in group if piece.is_between and splits else ():
                    _queue(walk, live, segment, piece.span)
                live.drop(f"{name} {piece.span}" for name in inner)
            live.drop(["handed back", *(f"d{name}" for name in inner if name != skeleton.result)])
        used = schedule.used_before(index)
        live.drop(key for name in skeleton.tensors if name not in used for key in (name, f"{name} again"))
    return live


def _make_again(walk: Walk, live: Live, again: Again) -> None:
    """What is made again before a group's gradients."""
    for group in walk.schedule.groups[:-1]:
        for tile in (piece.span for piece in walk.pieces if not piece.is_between):
            due = [run.segment for run in again.runs if run.segment in group and _overlap(tile, run.span)]
            _rerun_tile(walk, live, due, tile, again.kept)
        if group[0].reach is Reach.prefix:
            live.drop(f"{name} again" for name in again.spent.intersection(group[0].reads))


def _rerun_tile(walk: Walk, live: Live, due: list[Segment], tile: Span, kept: Collection[str]) -> None:
    temporary = []
    for segment in due:
        for name in segment.made:
            if name in kept:
                live.add(f"{name} again", walk.size(name, walk.all))
                if walk.is_single or segment.reach is Reach.prefix:
                    continue
            live.add(f"{name} tile", walk.size(name, tile))
            temporary.append(f"{name} tile")
        live.passing(walk.rows(segment.workspace(walk.itemsize).run, tile))
    live.drop(temporary)


def _backward_tile(walk: Walk, live: Live, group: Group, tile: Span, *, splits: bool) -> None:
    spaces = {segment.name: segment.workspace(walk.itemsize) for segment in group}
    reruns = tile_reruns(walk.schedule, walk.plan, group, walk.num_tokens, tile)
    mine: list[str] = []
    for segment in group:
        if segment not in reruns:
            continue
        mine += _decode(walk, live, segment.reads, tile)
        for name in (tensor.name for tensor in segment.makes if not tensor.is_state):
            mine.append(f"{name} value")
            live.add(mine[-1], walk.size(name, tile))
        live.passing(walk.rows(spaces[segment.name].run, tile))
    made = {name for segment in group for name in segment.made}
    mine += _decode(walk, live, (name for segment in group for name in segment.needs), tile)
    for segment in reversed(group):
        if splits:
            _queue(walk, live, segment, tile)
        else:
            live.add_sum(f"{segment.name} sums", max(WIDE_BYTES, walk.itemsize) * segment.trained)
            if segment.kind is Kind.linear and walk.casts_products:
                live.passing(_cast_bytes(walk, segment, tile))
        goes = [name for name in segment.reads if name != segment.adds]
        for name in goes:
            live.add(f"d{name} part", walk.size(name, tile))
            mine.append(f"d{name} part")
        # A scan has the gradients of two states in hand beside the one that it hands back.
        live.passing(walk.rows(spaces[segment.name].grad, tile) + 2 * walk.state_bytes(segment))
        live.drop(f"{name} value" for name in segment.made)
        live.drop(f"d{name} part" for name in segment.made)
    if walk.is_single:  # the parts are the whole
        live.drop(mine)
    for name in outside(group):
        assert name not in made
        live.add(f"d{name}", walk.size(name, walk.all))
    live.drop(mine)


def _queue(walk: Walk, live: Live, segment: Segment, tile: Span) -> None:
    """A linear segment leaves x and dy of a tile in the queue: what stands for them stays, or a copy of it."""
    if segment.kind is not Kind.linear or not segment.needs:
        return
    result = walk.schedule.skeleton.result
    names = [name for name in segment.reads if name != segment.adds]
    there: Sequence[Sequence[str]]
    for name in names:
        # Several tensors side by side are a copy.
        there = () if len(names) > 1 else ((f"{name} value", f"{name} {tile}"), (name, f"{name} again"))
        _stay(walk, live, name, f"{name} of {segment.name}", tile, there)
    for name in segment.made:
        # Gradients are added to that of a residual after it is put there.
        is_copied = segment.adds is not None and name != result
        there = () if is_copied else ((f"d{name} part",), ("dy" if name == result else f"d{name}",))
        _stay(walk, live, name, f"d{name}", tile, there)


def _stay(walk: Walk, live: Live, name: str, queued: str, tile: Span, there: Sequence[Sequence[str]]) -> None:
    """`there`: names of what may stand for the rows of a tile, and for all of them."""
    if f"{queued} queued" in live:
        return
    places = (f"{queued} {tile} queued", f"{queued} queued")
    if not any(live.rename(names, place) for names, place in zip(there, places, strict=False)):
        live.add(places[0], walk.size(name, tile))


def _decode(walk: Walk, live: Live, names: Iterable[str], tile: Span) -> list[str]:
    """Tensors of a tile come out of the codec where they are used first. Returns their values."""
    values = []
    for name in names:
        if name in walk.coded and f"{name} value" not in live and walk.places(name, tile):
            live.passing(walk.codec_bytes(name, tile)[1])
            live.add(f"{name} value", walk.size(name, tile))
            values.append(f"{name} value")
    return values


def _cast_bytes(walk: Walk, segment: Segment, tile: Span) -> int:
    """The two factors of the widest weight's gradient in fp32, and their product."""
    width_in = walk.schedule.skeleton.tensors[segment.reads[0]].width
    width_out = max(tensor.width for tensor in segment.makes)
    if segment.frozen:  # one factor of an adapter's gradient is as narrow as its rank
        return walk.rows(WIDE_BYTES * max(width_in, width_out), tile) if segment.adapted else 0
    return walk.rows(WIDE_BYTES * (width_in + width_out), tile) + WIDE_BYTES * width_in * width_out


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]
