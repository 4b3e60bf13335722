"""The cut of causal attention into pieces: against the mask by brute force."""

from __future__ import annotations

import random

import pytest

from headrace.kernels.attention import cut
from headrace.kernels.attention.cut import PieceKind, block_bounds, block_pieces
from headrace.kernels.packing import Packing


def seen(place: int, key: int, spans, window: int | None) -> bool:
    """Whether the query at `place` sees the key, by definition."""
    together = any(begin <= key <= place < end for begin, end in spans)
    return together and (window is None or place - key < window)


def scores_of(piece, row: int, spans, window: int | None) -> set[tuple[int, int, int]]:
    """(row, query, key) of all scores that the piece counts."""
    pairs = [(query, key) for query in range(*piece.queries) for key in range(*piece.keys)]
    if piece.kind is PieceKind.full:
        assert all(seen(*pair, spans, window) for pair in pairs), piece
    if piece.kind is PieceKind.causal:
        assert piece.queries == piece.keys, piece
        pairs = [(query, key) for query, key in pairs if key <= query]
        assert all(seen(*pair, spans, window) for pair in pairs), piece
    if piece.kind is PieceKind.masked:
        assert max(piece.queries[1] - piece.queries[0], piece.keys[1] - piece.keys[0]) <= cut.TILE, piece
        pairs = [(query, key) for query, key in pairs if 0 <= query - key < window]
        assert pairs, f"{piece} sees nothing"
    return {(row, *pair) for pair in pairs}


def test_every_seen_score_is_in_exactly_one_piece(monkeypatch) -> None:
    """Random cuts, windows and documents; nothing is counted twice and nothing that is seen is left out."""
    dice = random.Random(0)
    for _ in range(300):
        monkeypatch.setattr(cut, "TILE", dice.choice((1, 2, 3, 512)))
        num_keys = dice.randint(1, 17)
        num_queries = dice.randint(1, num_keys)
        window = dice.choice((None, None, 1, 2, 3, 5, 9, 30))
        lengths: list[int] = []
        while sum(lengths) < 2 * num_keys:
            left = num_keys - sum(lengths) % num_keys
            lengths.append(dice.randint(1, left) if dice.random() < 0.7 else left)
        rows = cut.documents_by_row(Packing.of_lengths(lengths), 2, num_keys)
        packed = dice.random() < 0.5
        if not packed:
            rows = (((0, num_keys),),) * 2
        # A call's queries stand anywhere in the row: the tail when a chunk is appended, the front when it is rebuilt.
        first = dice.randint(0, num_keys - num_queries)
        queries = (first, first + num_queries)
        counted: list[tuple[int, int, int]] = []
        for block in block_bounds(num_keys, dice.randint(1, num_keys + 1)):
            documents = rows if packed else None
            for piece in block_pieces(block, queries, batch_size=2, documents=documents, window=window):
                assert block[0] <= piece.keys[0] < piece.keys[1] <= block[1]
                assert queries[0] <= piece.queries[0] < piece.queries[1] <= queries[1]
                for row in range(*piece.rows):
                    spans = [span for span in rows[row] if span[0] <= piece.keys[0] < span[1]]
                    counted += scores_of(piece, row, spans, window)
        expected = {
            (row, place, key)
            for row in range(2)
            for place in range(*queries)
            for key in range(num_keys)
            if seen(place, key, rows[row], window)
        }
        assert len(counted) == len(set(counted))
        assert set(counted) == expected


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
    documents = (((0, 55), (55, 100)),)
    own = [block_pieces(block, (90, 100), batch_size=1, documents=documents) for block in bounds]
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
