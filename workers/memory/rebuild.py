"""What must run again, and on which tokens, so that backward has the values it needs. Pure functions, no torch.

The planner prices a plan with `rebuild` and the layer sweep runs what `rebuild` says, so the plan that was predicted
and the plan that runs are one function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from headrace.workers.model.skeleton import Segment, Span

Spans = tuple[Span, ...]


class Rerun(NamedTuple):
    """A segment that must run again on [begin, end) of the tokens."""

    segment: Segment
    span: Span


def rebuild(segments: Sequence[Segment], held: Mapping[str, Spans], wanted: Mapping[str, Spans]) -> tuple[Rerun, ...]:
    """The runs that make every wanted tensor out of the held ones, in the order in which they must run.

    A segment runs on exactly the tokens of its outputs that are wanted and not held. What it reads is then wanted there
    too, and of all earlier tokens where its reach is `prefix`.

    Args:
        segments: a skeleton's, in order.
        held: spans of every tensor that are at hand, by name; the others hold none.
        wanted: spans of tensors whose values are needed.

    Raises:
        ValueError: a tensor is wanted that nothing holds and no segment makes: the plan loses it.
    """
    if all(held.get(name) == spans for name, spans in wanted.items()):
        return ()
    return _rebuild(tuple(segments), tuple(held.items()), tuple(wanted.items()))


# Asked for every tile of every plan that is priced; the answers are few.
@lru_cache(maxsize=4096)
def _rebuild(
    segments: tuple[Segment, ...], held_items: tuple[tuple[str, Spans], ...], wanted: tuple[tuple[str, Spans], ...]
) -> tuple[Rerun, ...]:
    held = dict(held_items)
    lacking = {name: subtract(merge(spans), held.get(name, ())) for name, spans in wanted}
    runs: list[Rerun] = []
    for segment in reversed(segments):
        missing = merge(span for name in segment.made for span in lacking.pop(name, ()))
        if not missing:
            continue
        runs += [Rerun(segment, span) for span in reversed(missing)]
        for name in segment.reads:
            spans = ((0, missing[-1][1]),) if name in segment.earlier else missing
            lacking[name] = merge([*lacking.get(name, ()), *subtract(spans, held.get(name, ()))])
    lost = {name: spans for name, spans in lacking.items() if spans}
    if lost:
        raise ValueError(f"nothing holds {lost} and no segment makes them")
    return tuple(runs[::-1])


def merge(spans: Iterable[Span]) -> Spans:
    """The same tokens as sorted spans that neither overlap nor touch."""
    merged: list[Span] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return tuple(merged)


def subtract(spans: Spans, holes: Iterable[Span]) -> Spans:
    """The tokens of `spans` that are in none of the holes; `spans` are merged ones."""
    left: list[Span] = []
    cuts = merge(holes)
    for begin, end in spans:
        for low, high in cuts:
            if high <= begin or low >= end:
                continue
            if begin < low:
                left.append((begin, low))
            begin = high
            if begin >= end:
                break
        if begin < end:
            left.append((begin, end))
    return tuple(left)
