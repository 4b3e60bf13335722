"""The loaders: both yield the rows that the index function names, from any step, on any rank."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.tiers import has_id
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.batch import TokenBatch, to_batch
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.dali_loader import DaliReader
from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.data.memmap_loader import MemmapReader
from headrace.workers.data.prepared import PreparedData
from headrace.workers.data.rows import npy_header, write_row_sums
from headrace.workers.train.config import TrainConfig

LOADERS = [Loader.memmap, Loader.dali]
Open = Callable[..., TokenLoader]


@pytest.fixture
def open_rank(prepared_data: PreparedData) -> Any:
    """Open loaders over the small folder, and close them at the end."""
    opened: list[TokenLoader] = []

    def open_(
        kind: Loader,
        *,
        rank: int = 0,
        world: int = 1,
        batch: int = 2,
        micro: int = 3,
        split: str = "train",
        **values: Any,
    ) -> TokenLoader:
        config = DataConfig(
            **{"name": "t", "prepared": str(prepared_data.folder), "seq_len": 32, "eval_fraction": 0.1, "loader": kind}
            | values
        )
        train = TrainConfig(batch_size=batch, micro_batches=micro, seed=11)
        opened.append(open_loader(config, train=train, rank=rank, world_size=world, split=split))
        return opened[-1]

    yield open_
    for loader in opened:
        loader.close()


def same(ours: list[TokenBatch], theirs: list[TokenBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.packing.cu_seqlens, b.packing.cu_seqlens)
        and a.packing.lengths == b.packing.lengths
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 3), (2, 3)])
def test_batches_are_the_rows_of_the_index(
    open_rank: Open, prepared_data: PreparedData, kind: Loader, rank: int, world: int
) -> None:
    loader = open_rank(kind, rank=rank, world=world)
    tokens, flags = np.load(prepared_data.tokens_path), np.load(prepared_data.flags_path)
    # forward over an epoch's border, the same step again, back, and far away
    for step in (0, 1, 2, 3, 4, 20, 20, 21, 7, 8, 10**6):
        expected = [to_batch(tokens[rows], flags[rows]) for rows in loader.index.rank_rows(step, rank)]
        got = loader.step_batches(step)
        assert same(got, expected)
        assert len(got) == 3
        assert got[0].tokens.shape == (2, 32)


def test_both_loaders_resume_at_any_step_with_the_same_batches(open_rank: Open) -> None:
    whole = [open_rank(Loader.memmap).step_batches(step) for step in range(12)]
    for kind in LOADERS:
        for first in (0, 1, 5, 11):
            resumed = open_rank(kind)
            assert all(same(resumed.step_batches(step), whole[step]) for step in range(first, 12))
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("kind", LOADERS)
def test_ranks_share_the_step_of_one_rank(open_rank: Open, kind: Loader) -> None:
    one = open_rank(kind, world=1, batch=1, micro=6)
    for world, batch, micro in ((2, 1, 3), (3, 2, 1), (6, 1, 1)):
        ranks = [open_rank(kind, rank=r, world=world, batch=batch, micro=micro) for r in range(world)]
        for step in (0, 40):
            rows = [row for rank in ranks for part in rank.step_batches(step) for row in part.tokens.tolist()]
            assert sorted(rows) == sorted(row for part in one.step_batches(step) for row in part.tokens.tolist())


@pytest.mark.parametrize("kind", LOADERS)
def test_held_out_batches_are_the_same_every_time(open_rank: Open, kind: Loader) -> None:
    loader = open_rank(kind)
    first = loader.eval_batches(4)
    train = loader.step_batches(0)
    assert same(loader.eval_batches(4), first)
    assert same(loader.eval_batches(2), first[:2])
    assert same(loader.eval_batches(4), first)
    assert same(open_rank(Loader.memmap).eval_batches(4), first)
    assert same(loader.step_batches(1), open_rank(Loader.memmap).step_batches(1))
    held_out = {tuple(row) for batch in first for row in batch.tokens.tolist()}
    trained = {tuple(row) for step in range(20) for b in loader.step_batches(step) for row in b.tokens.tolist()}
    assert not held_out & trained
    assert not same(first[:3], train)
    assert loader.eval_batches(0) == []
    # over the ranks: other rows each, and together those of one rank
    ranks = [open_rank(kind, rank=r, world=2).eval_batches(2) for r in range(2)]
    rows = [row for rank in ranks for batch in rank for row in batch.tokens.tolist()]
    assert sorted(rows) == sorted(row for batch in first for row in batch.tokens.tolist())


def test_the_eval_split_can_be_stepped_through(open_rank: Open) -> None:
    loader = open_rank(Loader.memmap, split="eval")
    num_eval = loader.index.split.num_eval
    assert loader.epoch_of(num_eval) == loader.index.global_batch
    with pytest.raises(InputError, match="split='test': one of train, eval"):
        open_rank(Loader.memmap, split="test")


def test_without_held_out_rows_evaluation_is_refused(open_rank: Open) -> None:
    with pytest.raises(InputError, match=r"eval_fraction=0.0 of .* holds none out"):
        open_rank(Loader.memmap, eval_fraction=0.0).eval_batches(1)
    with pytest.raises(InputError, match="no row in the eval split"):
        open_rank(Loader.memmap, eval_fraction=0.0, split="eval")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("name", "bit"), [("tokens.npy", 1), ("flags.npy", 2)])
def test_a_row_that_was_damaged_is_named(
    open_rank: Open, prepared_data: PreparedData, tmp_path: Path, kind: Loader, name: str, bit: int
) -> None:
    folder = Path(shutil.copytree(prepared_data.folder, tmp_path / "copy"))
    array = np.load(folder / name, mmap_mode="r+")
    loader = open_rank(kind, prepared=str(folder))
    row = int(loader.index.rank_rows(0, 0)[0, 1])
    array[row, 30] ^= bit
    array.flush()
    with pytest.raises(InputError, match=rf"{folder}: row {row} ", check=has_id(ErrorId.data_damaged)):
        loader.step_batches(0)
    loader.step_batches(1)


def test_damaged_sums_are_refused(open_rank: Open, prepared_data: PreparedData, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared_data.folder, tmp_path / "copy"))
    content = (folder / "rows.sums").read_bytes()
    for damaged in (content[:-8], content[:-1] + bytes([content[-1] ^ 1]), b""):
        (folder / "rows.sums").write_bytes(damaged)
        with pytest.raises(InputError, match=r"rows.sums", check=has_id(ErrorId.data_damaged)):
            open_rank(Loader.memmap, prepared=str(folder))
    (folder / "rows.sums").unlink()
    with pytest.raises(InputError, match=r"rows.sums", check=has_id(ErrorId.data_damaged)):
        open_rank(Loader.memmap, prepared=str(folder))


@pytest.mark.parametrize("kind", LOADERS)
def test_a_token_beyond_the_vocabulary_is_named_with_its_row(
    open_rank: Open, prepared_data: PreparedData, tmp_path: Path, kind: Loader
) -> None:
    """A folder that somebody made so, with sums that fit."""
    folder = Path(shutil.copytree(prepared_data.folder, tmp_path / "copy"))
    tokens = np.load(folder / "tokens.npy", mmap_mode="r+")
    row = int(open_rank(kind, prepared=str(folder)).index.rank_rows(0, 0)[0, 1])
    tokens[row, 30] = 65_000
    tokens.flush()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "sums_digest": write_row_sums(folder)}))
    with pytest.raises(InputError, match=rf"tokens.npy row {row}: token id 65000, but the vocabulary has 300"):
        open_rank(kind, prepared=str(folder)).step_batches(0)


def test_what_does_not_fit_is_named(open_rank: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"data.prepared is not set"):
        open_rank(Loader.memmap, prepared=None)
    with pytest.raises(InputError, match=r"no meta.json"):
        open_rank(Loader.memmap, prepared=str(tmp_path))
    with pytest.raises(InputError, match=r"the run has data.seq_len=64"):
        open_rank(Loader.memmap, seq_len=64)
    with pytest.raises(InputError, match=r"train.batch_size=0"):
        open_rank(Loader.memmap, batch=0)
    with pytest.raises(InputError, match=r"rank 2 is not in a group of 2"):
        open_rank(Loader.memmap, rank=2, world=2)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError, match=r"nvidia-dali cannot be imported .* set data.loader=memmap"):
        open_rank(Loader.dali)


def test_rows_beyond_two_to_the_31_elements(tmp_path: Path) -> None:
    num_rows, num_columns = 600_000, 4097  # 1.14 x 2^31 tokens in sparse files
    marked = [0, 524_161, num_rows - 1]  # 2^31 elements end in row 524 160
    for name, dtype in (("tokens.npy", np.dtype(np.uint16)), ("flags.npy", np.dtype(np.uint8))):
        with open(tmp_path / name, "wb") as file:
            file.write(npy_header(dtype, num_rows, num_columns))
            file.truncate(128 + num_rows * num_columns * dtype.itemsize)
        array = np.load(tmp_path / name, mmap_mode="r+")
        for row in marked:
            array[row] = (np.arange(num_columns) + row) % 251
        array.flush()
    facts = {f.name: 0 for f in fields(PreparedData)} | {"folder": tmp_path, "seq_len": num_columns - 1}
    data = PreparedData(**{**facts, "num_rows": num_rows})
    for reader in (
        DaliReader(data.arrays[0], lambda _: np.array([marked])),
        MemmapReader(data.arrays[0], lambda _: np.array([marked])),
    ):
        (rows,) = reader.read(0)
        for i, row in enumerate(marked):
            expected = (np.arange(num_columns) + row) % 251
            assert (rows.tokens[i] == expected).all()
            assert (rows.flags[i] == expected).all()
        reader.close()


@pytest.mark.parametrize("kind", LOADERS)
def test_closing_twice_is_safe(open_rank: Open, kind: Loader) -> None:
    loader = open_rank(kind)
    loader.step_batches(0)
    loader.eval_batches(1)
    loader.close()
    loader.close()


def test_dali_gives_its_threads_back(open_rank: Open) -> None:
    def threads() -> set[str]:
        names = {}
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                names[task.name] = (task / "comm").read_text()
        return {task for task, name in names.items() if "DALI" in name}

    first = open_rank(Loader.dali)
    first.step_batches(0)
    assert threads(), "their names are known"
    first.close()
    before = threads()
    for step in range(0, 40, 2):  # every step is a jump: a new pipeline
        loader = open_rank(Loader.dali)
        loader.step_batches(step)
        loader.close()
    assert threads() <= before
