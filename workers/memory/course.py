"""The course of a block: what its forward and backward do, worked out once per plan and length of rows. No torch.

A schedule says what may run when, `rebuild` what must run again, a plan where tensors stay. The course is all of that
in compiled form: the layer sweep runs it step after step and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from headrace.workers.memory.plan import Cuts, LayerPlan
from headrace.workers.memory.rebuild import Spans, subtract
from headrace.workers.memory.schedule import (
    Again,
    BlobSpec,
    Group,
    Placing,
    Schedule,
    made_again,
    outside,
    placing,
    tile_reruns,
)
from headrace.workers.model.skeleton import Reach, Segment, Span

Held = Mapping[str, Spans]  # tokens of every tensor that are at hand


class Step(NamedTuple):
    """One segment on one tile in forward.

    Args:
        crossing: what it makes that later groups read: written into whole tensors.
        placing: where the other skeletal tensors go that it makes; None: all are dropped.
        done: tensors of the tile that nothing reads any more.
    """

    segment: Segment
    crossing: tuple[str, ...]
    placing: Placing | None
    done: tuple[str, ...]


class Rerun(NamedTuple):
    """Segments that run again on one span, each with what is taken of it: nothing holds that there."""

    span: Span
    segments: tuple[tuple[Segment, tuple[str, ...]], ...]


class Tile(NamedTuple):
    """One tile of a group: its forward, and what runs again before its gradients."""

    span: Span
    steps: tuple[Step, ...]
    again: Rerun


class Restored(NamedTuple):
    """A group of which something is held again, and on which spans.

    Args:
        spent: dropped behind it, see Again.
    """

    mixes: bool
    reruns: tuple[Rerun, ...]
    spent: tuple[str, ...]


class Work(NamedTuple):
    """One group of segments.

    Args:
        segments: the group.
        mixes: whether it is attention, or a segment like it, which takes whole rows.
        reads: what it reads and does not make.
        crossing: what it makes and later groups read.
        scans: those of its segments that scan.
        tiles: empty where it mixes.
        num_to_keys: of a group with a scan, the number of steps up to its last one.
        placing: of whole tensors that it makes; None: all are dropped.
        done: whole tensors that no later group reads.
        restored: what is made again before its gradients.
        inner: of what it makes, the tensors that are held for its gradients: let go of tile by tile.
        used: held tensors whose values no gradient takes any more once its gradients are there.
    """

    segments: Group
    mixes: bool
    reads: tuple[str, ...]
    crossing: tuple[str, ...]
    scans: Group
    tiles: tuple[Tile, ...]
    num_to_keys: int
    placing: Placing | None
    done: tuple[str, ...]
    restored: tuple[Restored, ...]
    inner: tuple[str, ...]
    used: tuple[str, ...]


class Course(NamedTuple):
    """See the module.

    Args:
        root: where the block's input goes.
        works: the groups in forward order.
        queries: the spans of queries that attention takes in turn.
        together: whole tensors that leave in one blob with others, by name.
    """

    root: Placing
    works: tuple[Work, ...]
    queries: tuple[Span, ...]
    together: Mapping[str, BlobSpec]


@lru_cache(maxsize=256)
def course_of(schedule: Schedule, plan: LayerPlan, cuts: Cuts, num_tokens: int) -> Course:
    """The course of blocks with this schedule and plan, on rows of so many tokens."""
    works = tuple(_works(schedule, plan, cuts, num_tokens))
    root = placing(plan, (schedule.skeleton.root.name,), (0, num_tokens), num_tokens)
    places = (root, *(work.placing for work in works))
    blobs = [blob for place in places if place is not None for blob in place.blobs]
    together = {name: blob for blob in blobs if len(blob.names) > 1 for name in blob.names}
    return Course(root, works, tuple(cuts.query_tiles(num_tokens)), together)


def _works(schedule: Schedule, plan: LayerPlan, cuts: Cuts, num_tokens: int) -> Iterator[Work]:
    skeleton, every = schedule.skeleton, (0, num_tokens)
    agains, whole = made_again(schedule, plan, num_tokens), {schedule.skeleton.root.name}
    held = list(_held(plan, agains, num_tokens))
    for index, (group, again) in enumerate(zip(schedule.groups, agains, strict=True)):
        mixes, crossing = group[0].reach is Reach.prefix, schedule.crossing[index]
        placed = tuple(n for n in skeleton.skeletal if skeleton.maker.get(n) in group and schedule.is_whole(n))
        whole.update(group[0].made if mixes else crossing)
        done = whole - schedule.later[index]
        whole -= done
        before, after = held[index]
        used = frozenset(skeleton.tensors) if group is schedule.groups[-1] else schedule.used_before(index + 1)
        spans = () if mixes else cuts.tiles(num_tokens)
        yield Work(
            segments=group,
            mixes=mixes,
            reads=outside(group),
            crossing=crossing,
            scans=tuple(segment for segment in group if segment.state is not None),
            tiles=tuple(
                Tile(
                    span,
                    tuple(_steps(schedule, plan, index, (span, num_tokens))),
                    _again(schedule, plan, group, after, (span, num_tokens)),
                )
                for span in spans
            ),
            num_to_keys=max((n for n, s in enumerate(group, 1) if s.reach is Reach.scan), default=len(group)),
            placing=_somewhere(plan, placed, (every, num_tokens)),
            done=tuple(done),
            restored=tuple(_restored(schedule, cuts, again, before, num_tokens)),
            inner=tuple(name for segment in group for name in segment.made if after.get(name)),
            used=tuple(name for name in used - schedule.used_before(index) if after.get(name)),
        )


def _held(plan: LayerPlan, agains: Sequence[Again], num_tokens: int) -> list[tuple[Held, Held]]:
    """What is held before and after tensors are made again for a group's gradients, for every group."""
    held, found = dict(plan.held(num_tokens)), list[tuple[Held, Held]]()
    for again in reversed(agains):
        before = dict(held)
        held |= dict.fromkeys(again.stays, ((0, num_tokens),))
        found.append((before, dict(held)))
    return found[::-1]


def _steps(schedule: Schedule, plan: LayerPlan, index: int, at: tuple[Span, int]) -> Iterator[Step]:
    """Of a group on one tile. `at`: the tile, and the tokens of the row."""
    group, crossing = schedule.groups[index], schedule.crossing[index]
    there = {*outside(group), *(segment.state.name for segment in group if segment.state is not None)}
    for segment in group:
        there |= {*segment.made}
        done = there - schedule.still_read[segment]
        there -= done
        names = tuple(n for n in schedule.skeleton.skeletal if n in segment.made and n not in crossing)
        crosses = tuple(name for name in segment.made if name in crossing)
        yield Step(segment, crosses, _somewhere(plan, names, at), tuple(done))


def _somewhere(plan: LayerPlan, names: tuple[str, ...], at: tuple[Span, int]) -> Placing | None:
    found = placing(plan, names, *at)
    return found if found.stays or found.blobs else None


def _again(schedule: Schedule, plan: LayerPlan, group: Group, held: Held, at: tuple[Span, int]) -> Rerun:
    """What runs again on one tile before its gradients."""
    tile, num_tokens = at
    due = tile_reruns(schedule, plan, group, num_tokens, tile)
    return Rerun(tile, tuple((s, _lacking(s.made, held, tile)) for s in group if s in due))


def _restored(schedule: Schedule, cuts: Cuts, again: Again, held: Held, num_tokens: int) -> Iterator[Restored]:
    for group in schedule.groups[:-1]:
        runs, mixes = [run for run in again.runs if run.segment in group], group[0].reach is Reach.prefix
        if not runs:
            continue
        reruns = []
        for span in cuts.query_tiles(num_tokens) if mixes else cuts.tiles(num_tokens):
            due = {run.segment for run in runs if run.span[0] < span[1] and span[0] < run.span[1]}
            taken = ((s, _lacking(s.made, held, span)) for s in group if s in due)
            reruns.append(Rerun(span, tuple((s, tuple(n for n in names if n in again.kept)) for s, names in taken)))
        spent = again.spent.intersection(group[0].reads) if mixes else ()
        yield Restored(mixes, tuple(rerun for rerun in reruns if rerun.segments), tuple(spent))


def _lacking(names: Sequence[str], held: Held, span: Span) -> tuple[str, ...]:
    """Those of which some of these tokens are not held."""
    return tuple(name for name in names if subtract((span,), held.get(name, ())))
