"""The cut of causal attention into pieces: against the mask by brute force."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest

from headrace.kernels.attention import cut
from headrace.kernels.attention.cut import PieceKind, block_bounds, block_pieces, readings_by_row
from headrace.kernels.packing import Packing


def seen(place: int, key: int, row: list[Document], window: int | None) -> bool:
    """Whether the query at `place` sees the key, by definition."""
    (reader,) = (document for document in row if document.begin <= place < document.end)
    (read,) = (document for document in row if document.begin <= key < document.end)
    distance = reader.prefix + place - reader.begin - (read.prefix + key - read.begin)
    return read.number in reader.path and distance >= 0 and (window is None or distance < window)


class Document(NamedTuple):
    """`path`: numbers of the documents that it sees, itself the last. `prefix`: tokens of the others."""

    number: int
    begin: int
    end: int
    path: tuple[int, ...]
    prefix: int


def random_rows(dice: random.Random, num_keys: int, *, share: float) -> tuple[Packing, list[list[Document]]]:
    """Two rows of documents, a share of which continue another one; trees of any depth."""
    rows: list[list[Document]] = [[], []]
    number = 0
    for row in rows:
        at = 0
        while at < num_keys:
            end = at + (dice.randint(1, num_keys - at) if dice.random() < 0.7 else num_keys - at)
            path: tuple[int, ...] = (number,)
            if row and dice.random() < share:
                path = (*row[-1].path[: dice.randint(1, len(row[-1].path))], number)
            prefix = sum(document.end - document.begin for document in row if document.number in path)
            row.append(Document(number, at, end, path, prefix))
            at, number = end, number + 1
    every = [document for row in rows for document in row]
    parents = [document.path[-2] if len(document.path) > 1 else None for document in every]
    lengths = [document.end - document.begin for document in every]
    return Packing.of_lengths(lengths, parents=parents if any(p is not None for p in parents) else ()), rows


def scores_of(piece, row: list[Document], window: int | None) -> set[tuple[int, int]]:
    """(query, key) of all scores that the piece counts."""
    pairs = [(query, key) for query in range(*piece.queries) for key in range(*piece.keys)]
    if piece.kind is PieceKind.full:
        assert all(seen(*pair, row, window) for pair in pairs), piece
    if piece.kind is PieceKind.causal:
        assert piece.queries == piece.keys, piece
        pairs = [(query, key) for query, key in pairs if key <= query]
        assert all(seen(*pair, row, window) for pair in pairs), piece
    if piece.kind is PieceKind.masked:
        assert max(piece.queries[1] - piece.queries[0], piece.keys[1] - piece.keys[0]) <= cut.TILE, piece
        pairs = [(query, key) for query, key in pairs if 0 <= query - piece.skip - key < window]
        assert pairs, f"{piece} sees nothing"
    return set(pairs)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_every_seen_score_is_in_exactly_one_piece(share: float, monkeypatch) -> None:
    """Random cuts, windows, documents and shared prefixes; nothing is counted twice, nothing that is seen left out."""
    dice = random.Random(0)
    for _ in range(300):
        monkeypatch.setattr(cut, "TILE", dice.choice((1, 2, 3, 512)))
        num_keys = dice.randint(1, 17)
        num_queries = dice.randint(1, num_keys)
        window = dice.choice((None, None, 1, 2, 3, 5, 9, 30))
        packing, rows = random_rows(dice, num_keys, share=share)
        readings = readings_by_row(packing, 2, num_keys, window)
        if share == 0 and dice.random() < 0.5:
            readings, rows = None, [[Document(0, 0, num_keys, (0,), 0)]] * 2
        # A call's queries stand anywhere in the row: the tail when a chunk is appended, the front when it is rebuilt.
        first = dice.randint(0, num_keys - num_queries)
        queries = (first, first + num_queries)
        counted: list[tuple[int, int, int]] = []
        for block in block_bounds(num_keys, dice.randint(1, num_keys + 1)):
            for piece in block_pieces(block, queries, batch_size=2, readings=readings, window=window):
                assert block[0] <= piece.keys[0] < piece.keys[1] <= block[1]
                assert queries[0] <= piece.queries[0] < piece.queries[1] <= queries[1]
                for row in range(*piece.rows):
                    counted += [(row, *pair) for pair in scores_of(piece, rows[row], window)]
        expected = {
            (row, place, key)
            for row in range(2)
            for place in range(*queries)
            for key in range(num_keys)
            if seen(place, key, rows[row], window)
        }
        assert len(counted) == len(set(counted))
        assert set(counted) == expected


def test_all_responses_read_a_block_of_their_prompt_in_one_call() -> None:
    packing = Packing.of_lengths((40, 8, 12, 20), parents=(None, 0, 0, 0))
    readings = readings_by_row(packing, 1, 80)
    found = [block_pieces(block, (0, 80), batch_size=1, readings=readings) for block in block_bounds(80, 20)]
    assert [[(piece.kind, piece.queries, piece.keys) for piece in pieces] for pieces in found[:2]] == [
        [(PieceKind.causal, (0, 20), (0, 20)), (PieceKind.full, (20, 80), (0, 20))],
        [(PieceKind.causal, (20, 40), (20, 40)), (PieceKind.full, (40, 80), (20, 40))],
    ]
    # The last response sees no block of its siblings.
    last = [bool(block_pieces(block, (60, 80), batch_size=1, readings=readings)) for block in block_bounds(80, 20)]
    assert last == [True, True, False, True]


def test_a_chunk_over_a_long_prefix_is_one_call_per_block_and_one_square() -> None:
    found = [block_pieces(block, (64, 80), batch_size=1) for block in block_bounds(80, 32)]
    assert [[(piece.kind, piece.keys) for piece in pieces] for pieces in found] == [
        [(PieceKind.full, (0, 32))],
        [(PieceKind.full, (32, 64))],
        [(PieceKind.causal, (64, 80))],
    ]


def test_blocks_that_no_query_sees_have_no_pieces() -> None:
    bounds = block_bounds(100, 10)
    near = [block_pieces(block, (90, 100), batch_size=1, window=25) for block in bounds]
    assert [bool(pieces) for pieces in near] == [False] * 6 + [True] * 4
    readings = readings_by_row(Packing.of_lengths((55, 45)), 1, 100)
    own = [block_pieces(block, (90, 100), batch_size=1, readings=readings) for block in bounds]
    assert [bool(pieces) for pieces in own] == [False] * 5 + [True] * 5
    assert own[5][0].keys == (55, 60)


def test_a_wide_window_needs_few_masked_tiles() -> None:
    """A window of 4096 over 64 Ki tokens: every query has fewer than TILE keys in masked tiles, nearly 4096 in all."""
    bounds = block_bounds(1 << 16, 1 << 14)
    area = dict.fromkeys(PieceKind, 0)
    for block in bounds:
        for piece in block_pieces(block, (0, 1 << 16), batch_size=1, window=4096):
            area[piece.kind] += (piece.queries[1] - piece.queries[0]) * (piece.keys[1] - piece.keys[0])
    assert 0 < area[PieceKind.masked] < (1 << 16) * cut.TILE < 0.13 * (1 << 16) * 4096


def test_bounds() -> None:
    assert block_bounds(10, 4) == ((0, 4), (4, 8), (8, 10))
    assert block_bounds(3, 128) == ((0, 3),)
    # A longer sequence keeps the cut of the shorter one.
    assert block_bounds(17, 4)[:2] == block_bounds(10, 4)[:2]
    for wrong in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match=f"num_keys={wrong[0]}, block_len={wrong[1]}"):
            block_bounds(*wrong)
