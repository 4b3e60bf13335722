"""Rows of several lengths: what is prepared against brute force, and what both loaders read of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from headrace.storage.core.errors import InputError
from headrace.workers.data import prepare as module
from headrace.workers.data.batch import to_batch
from headrace.workers.data.config import DataConfig, Loader, bucket_problem
from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepare import prepare_into
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.rows import PADDING, STARTS, TARGET
from headrace.workers.train.config import TrainConfig

Config = Callable[..., DataConfig]
WriteJsonl = Callable[..., Path]
BUCKETS = [8, 20, 64]
WORDS = ["the", "river", "turns", "a", "wheel", "and", "the", "wheel", "turns", "the", "stone"]


def texts(seed: int = 3) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.choice((1, 2, 6, 15, 40, 90)))) for _ in range(150)]


@pytest.fixture
def data(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> PreparedData:
    path = write_jsonl([{"text": text} for text in texts()])
    return prepare_into(data_config(path, seq_len=64, buckets=BUCKETS), tmp_path / "rows")


def brute_force(data: PreparedData) -> dict[int, list[list[tuple[int, int]]]]:
    """Rows of (token, flags) by length, made document by document."""
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path))
    rows: dict[int, list[list[tuple[int, int]]]] = {length: [] for length in BUCKETS}
    end = data.end_of_document_id
    for text in texts():
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, end]
        cells = [(token, TARGET | (STARTS if i == 0 else 0)) for i, token in enumerate(ids)]
        holds = [length for length in BUCKETS if len(ids) <= length + 1]
        length = holds[0] if holds else BUCKETS[-1]
        place = rows[length]
        if holds and place and len(place[-1]) + len(ids) > length + 1:
            fill(place[-1], length, end)
        for token, flags in cells:
            if not place or len(place[-1]) == length + 1:
                place.append([])
            place[-1].append((token, flags | (0 if place[-1] else STARTS)))
    for length, place in rows.items():
        fill(place[-1], length, end)
    return rows


def fill(row: list[tuple[int, int]], length: int, end: int) -> None:
    missing = length + 1 - len(row)
    row += [(end, PADDING | (STARTS if i == 0 else 0)) for i in range(missing)]


def test_a_document_is_whole_in_the_shortest_row_that_holds_it(data: PreparedData) -> None:
    expected = brute_force(data)
    for array, bucket in zip(data.arrays, data.buckets, strict=True):
        wanted = np.array(expected[array.seq_len])
        assert (np.load(array.tokens_path) == wanted[:, :, 0]).all()
        assert (np.load(array.flags_path) == wanted[:, :, 1]).all()
        assert bucket.num_rows == len(wanted)
        assert bucket.num_tokens == int(((wanted[:, :, 1] & PADDING) == 0).sum())
    assert data.lengths == tuple(BUCKETS)
    assert data.num_rows == sum(map(len, expected.values()))
    flags = np.concatenate([np.load(array.flags_path).ravel() for array in data.arrays])
    assert data.num_tokens == int(((flags & PADDING) == 0).sum())
    assert data.num_target_tokens == int(((flags & (STARTS | TARGET)) == TARGET).sum())
    assert data.digest == data.content_digest()


def test_no_buckets_is_the_data_of_before(write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path) -> None:
    path = write_jsonl([{"text": text} for text in texts()])
    plain = prepare_into(data_config(path, seq_len=64), tmp_path / "plain")
    meta = json.loads((plain.folder / "meta.json").read_text())
    assert "buckets" not in meta
    assert plain.digest == DIGEST_OF_PLAIN
    flags = np.load(plain.flags_path)
    assert not (flags & PADDING).any()


@pytest.mark.parametrize("stop_at", [3, 25, 60])
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path, interrupt: Callable[..., None], stop_at: int
) -> None:
    config = data_config(write_jsonl([{"text": text} for text in texts()]), seq_len=64, buckets=BUCKETS)
    whole = prepare_into(config, tmp_path / "whole")
    interrupt(config, tmp_path / "out", stop_at=stop_at, batch_bytes=100)
    again = prepare_into(config, tmp_path / "out")
    names = {path.name for path in whole.folder.iterdir()}
    assert names >= {f"{kind}-{length}.npy" for kind in ("tokens", "flags") for length in BUCKETS}
    assert all((again.folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in names)


def test_a_text_in_pieces_goes_where_the_whole_text_goes(
    data_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.workers.data import readers

    (tmp_path / "source").mkdir()
    for i, text in enumerate(texts()[:30]):
        (tmp_path / "source" / f"{i:02}.txt").write_text(text.replace(" ", "\n"))
    config = data_config(tmp_path / "source", seq_len=64, buckets=BUCKETS)
    whole = prepare_into(config, tmp_path / "whole")
    monkeypatch.setattr(readers, "PIECE_BYTES", 16)
    monkeypatch.setattr(module, "COMMIT_BYTES", 1)
    monkeypatch.setattr(module, "BATCH_BYTES", 10)
    parts = prepare_into(data_config(tmp_path / "source", seq_len=64, buckets=BUCKETS), tmp_path / "parts")
    assert parts.digest == whole.digest


@pytest.fixture
def open_rank(data: PreparedData) -> Any:
    opened: list[TokenLoader] = []

    def open_(kind: Loader, rank: int = 0, world: int = 1) -> TokenLoader:
        config = DataConfig(
            name="t", prepared=str(data.folder), seq_len=64, buckets=BUCKETS, eval_fraction=0.1, loader=kind
        )
        train = TrainConfig(batch_size=1, micro_batches=3, seed=11)
        opened.append(open_loader(config, train=train, rank=rank, world_size=world))
        return opened[-1]

    yield open_
    for loader in opened:
        loader.close()


@pytest.mark.parametrize("kind", list(Loader))
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_batches_are_the_rows_of_the_index(
    open_rank: Any, data: PreparedData, kind: Loader, rank: int, world: int
) -> None:
    loader = open_rank(kind, rank, world)
    stored = [
        (tokens, flags)
        for array in data.arrays
        for tokens, flags in zip(np.load(array.tokens_path), np.load(array.flags_path), strict=True)
    ]

    def expected(rows: Any) -> Any:
        return to_batch(np.stack([stored[row][0] for row in rows]), np.stack([stored[row][1] for row in rows]))

    lengths = set()
    for step in (0, 1, 2, 3, 20, 20, 21, 7, 10**6):  # on, the same again, back, far away
        for batch, rows in zip(loader.step_batches(step), loader.index.rank_rows(step, rank), strict=True):
            wanted = expected(rows)
            assert torch.equal(batch.tokens, wanted.tokens)
            assert torch.equal(batch.targets, wanted.targets)
            assert batch.packing.lengths == wanted.packing.lengths
            assert len(batch.tokens) == 64 // batch.seq_len
            lengths.add(batch.seq_len)
    assert lengths == set(BUCKETS)
    for _ in range(3):
        held_out = loader.eval_batches(5)
        for batch, rows in zip(held_out, loader.index.evaluation(5).rank_rows(0, rank), strict=True):
            assert torch.equal(batch.tokens, expected(rows).tokens)


def test_padding_counts_as_no_token_and_no_document(data: PreparedData, open_rank: Any) -> None:
    loader = open_rank(Loader.memmap)
    num_padding = 0
    for step in range(12):
        for batch, rows in zip(loader.step_batches(step), loader.index.rank_rows(step, 0), strict=True):
            flags = np.stack([flags_of(data, int(row))[:-1] for row in rows])
            is_padding = (flags & PADDING) != 0
            assert batch.num_tokens == int((~is_padding).sum())
            assert sum(batch.document_lengths) == batch.num_tokens
            assert (batch.targets.numpy()[:, :-1][is_padding[:, 1:]] == -100).all()
            num_padding += int(is_padding.sum())
    assert num_padding > 0


def flags_of(data: PreparedData, row: int) -> Any:
    array = data.array_of(row)
    return np.load(array.flags_path)[row - array.first_row]


@pytest.mark.parametrize("length", BUCKETS)
def test_a_damaged_row_is_named_by_its_file(data: PreparedData, open_rank: Any, length: int) -> None:
    array = next(array for array in data.arrays if array.seq_len == length)
    tokens = np.load(array.tokens_path, mmap_mode="r+")
    tokens[:, 3] += 1
    tokens.flush()
    loader = open_rank(Loader.memmap)
    with pytest.raises(InputError, match=rf"row \d+ of tokens-{length}.npy or flags-{length}.npy differs"):
        [loader.step_batches(step) for step in range(40)]


def test_other_buckets_than_the_runs_are_other_data(data: PreparedData) -> None:
    open_prepared(data.folder, seq_len=64, buckets=BUCKETS)
    for buckets, said in (([], "no data.buckets"), ([20, 64], r"data.buckets=20,64")):
        with pytest.raises(InputError, match=rf"data.seq_len=64 data.buckets=8,20,64, the run has .*{said}; set that"):
            open_prepared(data.folder, seq_len=64, buckets=buckets)


@pytest.mark.parametrize(
    "rows",
    [
        5,
        [5],
        [{"seq_len": 64}],
        [{"seq_len": 64, "num_rows": -1, "num_tokens": 3}],
        [{"seq_len": 64, "num_rows": 1, "num_tokens": 3}],
        [{"seq_len": "../64", "num_rows": 1, "num_tokens": 3}],
    ],
)
def test_buckets_that_the_rest_of_meta_contradicts_are_refused(data: PreparedData, tmp_path: Path, rows: Any) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data.folder, folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "buckets": rows}))
    with pytest.raises(InputError, match=r"buckets=.*prepare it again"):
        open_prepared(folder)


def test_an_empty_length_and_much_padding_are_told(
    write_jsonl: WriteJsonl, data_config: Config, tmp_path: Path
) -> None:
    path = write_jsonl([{"text": "the wheel turns the stone"}] * 40)
    with pytest.warns(UserWarning, match=r"data\.buckets") as caught:
        data = prepare_into(data_config(path, seq_len=300, buckets=[4, 299, 300]), tmp_path / "out")
    words = "\n".join(str(warning.message) for warning in caught)
    assert "no document goes to rows of 4,300 tokens" in words
    assert data.buckets[0].num_rows == 0
    config = DataConfig(name="t", prepared=str(data.folder), seq_len=300, buckets=[4, 299, 300], eval_fraction=0.0)
    loader = open_loader(config, train=TrainConfig(), rank=0, world_size=1)
    assert {batch.seq_len for step in range(5) for batch in loader.step_batches(step)} == {299}
    loader.close()


@pytest.mark.parametrize(
    ("buckets", "remedy"),
    [
        ([512, 256, 1024], "give data.buckets=256,512,1024"),
        ([256, 256, 1024], "give data.buckets=256,1024"),
        ([256, 512], "give data.buckets=256,512,1024, or data.seq_len=512 data.buckets=256,512"),
        ([256, 2048], "give data.buckets=256,1024, or data.seq_len=2048 data.buckets=256,2048"),
        ([0, 1024], "a row of 0 tokens; give lengths of at least 1"),
        ([-5, 1024], "a row of -5 tokens"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_with_the_remedy(
    buckets: list[int], remedy: str, data_config: Config, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    said = bucket_problem(buckets, 1024)
    assert said is not None
    assert said.startswith(f"data.buckets={','.join(map(str, buckets))}: ")
    assert said.endswith(remedy) or remedy in said
    with pytest.raises(InputError, match=r"data\.buckets="):
        prepare_into(data_config(write_jsonl([{"text": "a"}]), seq_len=1024, buckets=buckets), tmp_path / "out")
    assert bucket_problem([256, 1024], 1024) is None
    assert bucket_problem([], 1024) is None


# Of the release before data.buckets.
DIGEST_OF_PLAIN = "189445a21cb9d699c5a508a049706c1fddd12e4ec29a2abee7ee62c5d431e200"
