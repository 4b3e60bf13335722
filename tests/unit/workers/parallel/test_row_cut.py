"""Which tokens of a row every rank has, and which scores it computes: against brute force."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from headrace.kernels.api import IGNORED_TARGET, Packing
from headrace.storage.core.errors import InputError
from headrace.workers.data.batch import TokenBatch
from headrace.workers.parallel.config import RingLayout
from headrace.workers.parallel.context import SplitBatch, SplitPacking, TokenIndex
from headrace.workers.parallel.ring_cut import RingCut
from headrace.workers.parallel.row_cut import cut_row, key_heads_problem, layout_of, length_problem, num_hops

LAYOUTS = [RingLayout.zigzag, RingLayout.striped, RingLayout.contiguous]


def random_lengths(draw: random.Random, total: int) -> list[int]:
    lengths = []
    while total:
        lengths.append(min(total, draw.choice([1, 2, 3, 5, 9, 17, 40])))
        total -= lengths[-1]
    return lengths


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_has_one_rank_and_every_rank_as_many(layout: RingLayout) -> None:
    draw = random.Random(3)
    for _ in range(200):
        ring = draw.choice([1, 2, 3, 4, 8])
        seq_len = ring * draw.randrange(1, 30)
        cut = cut_row(random_lengths(draw, seq_len), ring, layout)
        places = [[place for span in spans for place in range(*span)] for spans in cut]
        assert {len(own) for own in places} == {seq_len // ring}
        assert sorted(place for own in places for place in own) == list(range(seq_len))
        assert all(own == sorted(own) for own in places)
        assert all(a[1] < b[0] for spans in cut for a, b in itertools.pairwise(spans))


def scores_per_rank(lengths: list[int], ring: int, layout: RingLayout) -> list[int]:
    starts = [start for i, n in enumerate(lengths) for start in [sum(lengths[:i])] * n]
    return [sum(p - starts[p] + 1 for s in spans for p in range(*s)) for spans in cut_row(lengths, ring, layout)]


def test_the_work_is_even() -> None:
    zigzag = scores_per_rank([64], 4, RingLayout.zigzag)
    assert zigzag == [520] * 4
    contiguous = scores_per_rank([64], 4, RingLayout.contiguous)
    assert contiguous == [136, 392, 648, 904]
    striped = scores_per_rank([64], 4, RingLayout.striped)
    assert max(zigzag) < max(striped) < max(contiguous)
    documents = scores_per_rank([300, 7, 95, 64, 2, 44], 4, RingLayout.zigzag)
    assert 4 * max(documents) / sum(documents) <= 1.05


def test_auto_keeps_a_window_with_its_neighbour() -> None:
    assert layout_of(RingLayout.auto, ring=4, seq_len=64, window=16) is RingLayout.contiguous
    assert layout_of(RingLayout.auto, ring=4, seq_len=64, window=17) is RingLayout.zigzag
    assert layout_of(RingLayout.auto, ring=4, seq_len=64, window=None) is RingLayout.zigzag
    assert layout_of(RingLayout.striped, ring=4, seq_len=64, window=16) is RingLayout.striped
    hops = [num_hops(RingLayout.contiguous, ring=4, seq_len=64, window=w) for w in (1, 2, 17, 18, 64, None)]
    assert hops == [0, 1, 1, 2, 3, 3]
    assert num_hops(RingLayout.zigzag, ring=4, seq_len=64, window=2) == 3


def test_lengths_and_heads_that_do_not_fit_are_named_with_what_does() -> None:
    assert length_problem("data.seq_len=30", 30, ring=3, ulysses=2) is None
    problem = length_problem("data.seq_len=32", 32, ring=3, ulysses=2)
    assert problem is not None
    assert all(word in problem for word in ("data.seq_len=32", "=6", "use 30 or 36"))
    assert [key_heads_problem(n, 4) is None for n in (1, 2, 3, 4, 6, 8)] == [True, True, False, True, False, True]
    with pytest.raises(InputError, match="rows of 7 tokens"):
        TokenIndex(2, 1, 0, 0, RingLayout.auto).split(batch_of(1, 7, [7]))


def batch_of(batch_size: int, seq_len: int, lengths: list[int]) -> TokenBatch:
    tokens = torch.arange(batch_size * seq_len).view(batch_size, seq_len)
    targets = tokens + 1
    targets[:, ::5] = IGNORED_TARGET
    return TokenBatch(tokens, targets, Packing.of_lengths(lengths), padding=(lengths[-1],))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 4), (4, 1), (2, 2)])
def test_one_index_cuts_tokens_targets_positions_and_documents(ring: int, ulysses: int) -> None:
    lengths = [11, 3, 10, 5, 19]
    whole = batch_of(2, 24, lengths)
    parts = []
    for rank in range(4):
        index = TokenIndex(ring, ulysses, rank // ulysses, rank % ulysses, RingLayout.zigzag)
        part = index.split(whole)
        assert isinstance(part, SplitBatch)
        assert isinstance(part.packing, SplitPacking)
        places = part.packing.places
        assert torch.equal(part.tokens, whole.tokens.gather(1, places))
        assert torch.equal(part.targets, whole.targets.gather(1, places))
        wanted = whole.packing.positions(2, 24, torch.device("cpu")).gather(1, places)
        assert torch.equal(part.packing.positions(2, 24, torch.device("cpu")), wanted)
        assert torch.equal(part.packing.documents(2, 24), whole.packing.documents(2, 24).gather(1, places))
        assert (part.seq_len, part.document_lengths, part.num_sharers) == (24, whole.document_lengths, 4)
        parts.append(part)
    assert sorted(torch.cat([part.tokens for part in parts], 1).flatten().tolist()) == list(range(48))
    assert sum(part.num_targets for part in parts) == whole.num_targets
    assert sum(part.num_tokens for part in parts) == whole.num_tokens == 29
    assert TokenIndex(1, 1, 0, 0, RingLayout.auto).split(whole) is whole


@pytest.mark.parametrize(("ulysses", "tensor"), [(4, 1), (1, 2), (2, 2)])
def test_ranks_share_a_chunk_evenly(ulysses: int, tensor: int) -> None:
    """Tokens, targets and positions of a span: one Ulysses rank after the other, tensor ranks side by side."""
    whole, span = batch_of(2, 24, [11, 3, 10, 5, 19]), slice(8, 16)
    wanted = (whole.tokens, whole.targets, whole.packing.positions(2, 24, torch.device("cpu")))
    found: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(ulysses):
        batch = TokenIndex(1, ulysses, 0, rank, RingLayout.auto, tensor=tensor).split(whole)
        tokens, targets, packing = batch.part((8, 16))
        for parts, own in zip(found, (tokens, targets, packing.positions(2, 24, tokens.device)), strict=True):
            parts.append(own.unflatten(1, (-1, tensor)).transpose(1, 2).flatten(1))
    for parts, of_rows in zip(found, wanted, strict=True):
        assert torch.equal(torch.cat(parts, 1), of_rows[:, span])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_are_all_scores_that_are_seen_each_once(layout: RingLayout, window: int | None) -> None:
    """With documents that continue others, too; for all queries of a rank, and for some."""
    draw, seq_len, ring = random.Random(5), 24, 3
    for trial in range(12):
        lengths = [seq_len] if trial % 3 == 0 else random_lengths(draw, seq_len)
        continues = trial % 3 == 1 and len(lengths) > 1
        parents = [None, *[0] * (len(lengths) - 1), None] if continues else []
        packing = Packing.of_lengths([*lengths, seq_len], parents=parents)
        whole = TokenBatch(torch.zeros(2, seq_len, dtype=torch.int64), torch.zeros(2, seq_len), packing)
        seen = torch.zeros(2, seq_len, seq_len, dtype=torch.int64)
        stretches = [(0, seq_len // ring)] if trial % 2 else [(1, 3), (5, 8)]
        wanted = torch.zeros_like(seen)
        for rank in range(ring):
            part = TokenIndex(ring, 1, rank, 0, layout, window).split(whole)
            assert isinstance(part.packing, SplitPacking)
            cut = RingCut(part.packing, 2, window)
            queries = cut.queries(rank, stretches)
            for source in range(ring):
                for met in cut.meetings(rank, stretches, source):
                    count(seen, met.pieces, queries[met.query].rows[0], window)
            for begin, end in stretches:
                for row in range(2):
                    own = part.packing.places[row, begin:end]
                    wanted[row, own] = mask(packing, seq_len, window)[row, own]
        assert torch.equal(seen, wanted), (lengths, parents, stretches)


def count(seen: torch.Tensor, pieces: tuple, first_row: int, window: int | None) -> None:
    for piece in pieces:
        queries, keys = torch.arange(*piece.queries)[:, None], torch.arange(*piece.keys)
        distance = queries - piece.skip - keys
        of_piece = torch.ones_like(distance) if piece.kind == "full" else (distance >= 0).long()
        if piece.kind == "masked":
            of_piece *= distance < (window or 10**9)
        rows = slice(first_row + piece.rows[0], first_row + piece.rows[1])
        seen[rows, slice(*piece.queries), slice(*piece.keys)] += of_piece


def mask(packing: Packing, seq_len: int, window: int | None) -> torch.Tensor:
    """(2, T, T): 1 where a query sees a key."""
    documents = Packing.documents(packing, 2, seq_len)
    positions = Packing.positions(packing, 2, seq_len, torch.device("cpu"))
    seen = torch.zeros(2, seq_len, seq_len, dtype=torch.int64)
    for row in range(2):
        for query in range(seq_len):
            own = int(documents[row, query])
            for key in range(query + 1):
                there = int(documents[row, key])
                is_near = window is None or int(positions[row, query] - positions[row, key]) < window
                seen[row, query, key] = (there in (own, *packing.ancestors(own))) and is_near
    return seen
