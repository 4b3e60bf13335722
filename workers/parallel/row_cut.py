"""How the tokens of a row are shared by ring and Ulysses ranks: pure integers. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from headrace.workers.parallel.config import RingLayout

Span = tuple[int, int]  # tokens [begin, end) of a row
Spans = tuple[Span, ...]
STRIPES_PER_RANK = 4


def layout_of(wanted: RingLayout, *, ring: int, seq_len: int, window: int | None) -> RingLayout:
    """The layout that `auto` stands for; a named one is itself.

    With a window of at most a rank's part of the row, every rank needs its own keys and its neighbour's, and all ranks
    have the same work already: contiguous. Else zigzag.
    """
    if wanted is not RingLayout.auto:
        return wanted
    is_near = window is not None and window <= seq_len // ring
    return RingLayout.contiguous if is_near or ring == 1 else RingLayout.zigzag


def num_hops(layout: RingLayout, *, ring: int, seq_len: int, window: int | None) -> int:
    """How often keys and values are passed on: to all other ranks, or as far as a window reaches back.

    Args:
        layout: not auto.
    """
    if layout is not RingLayout.contiguous or window is None:
        return ring - 1
    return min(ring - 1, -(-(window - 1) // (seq_len // ring)))


def cut_row(lengths: Sequence[int], ring: int, layout: RingLayout) -> tuple[Spans, ...]:
    """Of every ring rank, the spans of the row that it has: ascending, disjoint, as many tokens for each rank.

    zigzag and striped cut every document of at least one token per piece by itself; shorter ones that follow each
    other are cut as one. Pieces of a document differ by one token at most; the longer ones go to the ranks with fewest
    tokens.

    Args:
        lengths: of the documents of the row.
        layout: not auto.

    Raises:
        ValueError: the ranks cannot have the same number of tokens.
    """
    seq_len = sum(lengths)
    if seq_len % ring:
        raise ValueError(f"rows of {seq_len} tokens over a ring of {ring}: not a multiple")
    owners = _owners(ring, layout)
    units = [seq_len] if layout is RingLayout.contiguous else _units(lengths, len(owners))
    totals, found, place = [0] * ring, [list[Span]() for _ in range(ring)], 0
    for length in units:
        for owner, size in zip(owners, _sizes(length, owners, totals), strict=True):
            spans = found[owner]
            if size and spans and spans[-1][1] == place:
                spans[-1] = (spans[-1][0], place + size)
            elif size:
                spans.append((place, place + size))
            place += size
    assert len(set(totals)) == 1, f"{lengths} over {ring} ranks: {totals}"
    return tuple(map(tuple, found))


def _owners(ring: int, layout: RingLayout) -> list[int]:
    """The rank of every piece of a document."""
    ranks = list(range(ring))
    if layout is RingLayout.zigzag:
        return [*ranks, *reversed(ranks)]
    return ranks * STRIPES_PER_RANK if layout is RingLayout.striped else ranks


def _units(lengths: Sequence[int], least: int) -> list[int]:
    """What is cut by itself: documents of at least `least` tokens, and runs of shorter ones."""
    units: list[int] = []
    was_short = False
    for length in lengths:
        is_short = length < least
        if is_short and was_short:
            units[-1] += length
        else:
            units.append(length)
        was_short = is_short
    return units


def _sizes(length: int, owners: Sequence[int], totals: list[int]) -> list[int]:
    """Tokens of every piece of a unit; `totals` of the ranks are brought up to date. They differ by one at most."""
    size, rest = divmod(length, len(owners))
    sizes = [size] * len(owners)
    for owner in owners:
        totals[owner] += size
    free = {rank: [i for i, owner in enumerate(owners) if owner == rank] for rank in range(len(totals))}
    for _ in range(rest):
        rank = min((r for r in free if free[r]), key=lambda r: (totals[r], r))
        sizes[free[rank].pop(0)] += 1
        totals[rank] += 1
    return sizes


def length_problem(what: str, length: int, *, ring: int, ulysses: int, tensor: int = 1) -> str | None:
    """What is wrong with a length of rows, in words; None where the ranks of a context group can share them."""
    unit = ring * ulysses * tensor
    if length % unit == 0:
        return None
    names = ("parallel.tensor x " if tensor > 1 else "") + "parallel.ulysses x parallel.ring"
    return f"{what}: {names}={unit} cut it evenly; use {length // unit * unit or unit} or {(length // unit + 1) * unit}"


def chunk_problems(
    what: str, degrees: Mapping[str, int], *, sizes: Iterable[int] = (), has_pages: bool = False
) -> Iterator[str]:
    """What keeps ranks from sharing the chunks of a plan by chunk, in words.

    Args:
        what: names the plan.
        degrees: by axis.
        sizes: of chunks, in tokens.
        has_pages: whether attention reads chosen pages.
    """
    for name, degree in degrees.items():
        if degree > 1 and (name in ("ring", "pipeline") or has_pages):
            other = ", or memory=chunk_host" if has_pages else ""
            yield f"{what}: parallel.{name}={degree} is not supported by chunk; set parallel.{name}=1{other}"
    for size in sizes:
        if problem := length_problem(
            f"chunk_size={size}", size, ring=1, ulysses=degrees["ulysses"], tensor=degrees["tensor"]
        ):
            yield problem


def key_heads_problem(ulysses: int, num_key_heads: int, tensor: int = 1) -> str | None:
    """What is wrong with a Ulysses degree for so many KV heads, in words. A multiple of them replicates each.

    Args:
        tensor: ranks that share the heads first.
    """
    own = max(1, num_key_heads // max(1, tensor))
    if ulysses < 1 or own % ulysses == 0 or ulysses % own == 0:
        return None
    shared = f" / parallel.tensor={own}" if tensor > 1 else f"={num_key_heads}"
    return (
        f"parallel.ulysses={ulysses}: neither divides model.num_kv_heads{shared} nor is a multiple of it; "
        "choose one that does"
    )
