"""Token rows of a remote folder: the batches of the local one, only the rows that were read, and no silent zeros."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace.helpers.buckets import FAR, tiny_bucket_data
from headrace.helpers.s3 import Fault, Request, S3Server
from headrace.helpers.tiers import has_id
from headrace.helpers.training import run_distributed, run_recorded, tiny_data, tiny_job
from headrace.platform.cli.main import main
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.remote.errors import RemoteChanged, RemoteMissing, RemoteUnavailable
from headrace.workers.data import loader as loader_module
from headrace.workers.data import mirror
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.data.mirror import RowMirror
from headrace.workers.data.opening import open_prepared
from headrace.workers.data.prepared import PreparedData
from headrace.workers.job import RankContext
from headrace.workers.train.config import TrainConfig

ROW_BYTES = 33 * 2
KINDS = [Loader.memmap, Loader.dali]
NUM_STEPS = 8  # more than an epoch of rows


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Some two dozen rows of 32 tokens."""
    return open_prepared(str(tiny_data(tmp_path_factory.mktemp("rows"), num_documents=12).prepared))


@pytest.fixture
def url(s3: S3Server, bucket: str, local: PreparedData) -> str:
    address = s3.upload(local.folder, bucket, "data/rows")
    s3.requests.clear()
    return address


def loader_of(prepared: str | Path, kind: Loader = Loader.memmap, **values: Any) -> TokenLoader:
    options = {"rank": 0, "world_size": 1, "eval_fraction": 0.1, "batch": 2, "micro": 2, "buckets": (), **values}
    config = DataConfig(
        name="t",
        prepared=str(prepared),
        seq_len=32,
        buckets=list(options["buckets"]),
        eval_fraction=options["eval_fraction"],
        loader=kind,
    )
    train = TrainConfig(batch_size=options["batch"], micro_batches=options["micro"], seed=11)
    return open_loader(config, train=train, rank=options["rank"], world_size=options["world_size"])


@pytest.fixture
def open_(s3: S3Server) -> Iterator[Callable[..., TokenLoader]]:
    opened: list[TokenLoader] = []

    def open_one(*args: Any, **values: Any) -> TokenLoader:
        opened.append(loader_of(*args, **values))
        return opened[-1]

    yield open_one
    for loader in opened:
        loader.close()


def same(ours: Any, theirs: Any) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in zip(ours, theirs, strict=True)
    )


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(("kind", "rank", "world_size"), [(Loader.memmap, 0, 1), (Loader.dali, 1, 2)])
def test_batches_are_those_of_the_local_folder(
    open_: Any, url: str, local: PreparedData, kind: Loader, rank: int, world_size: int
) -> None:
    ours = open_(url, kind, rank=rank, world_size=world_size)
    theirs = open_(local.folder, rank=rank, world_size=world_size)
    assert theirs.epoch_of(NUM_STEPS - 1) > 1  # over the border of an epoch
    for step in (*range(NUM_STEPS), NUM_STEPS - 1, 3, 4, 10**6):
        assert same(ours.step_batches(step), theirs.step_batches(step)), step
        if step % 4 == 0:
            assert same(ours.eval_batches(2), theirs.eval_batches(2))
    assert ours.data.where == url
    assert ours.data.digest == local.digest
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (ours.data.folder / name).read_bytes() == (local.folder / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rows_that_were_read_are_transferred(
    open_: Any, s3: S3Server, url: str, kind: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 1)
    loader = open_(url, kind, batch=1, micro=1)
    for step in range(4):
        loader.step_batches(step)
    loader.close()
    read = np.unique([loader.index.rank_rows(step, 0) for step in range(4)]).size
    # DALI itself reads one step ahead.
    ahead = np.unique([loader.index.rank_rows(step, 0) for step in range(6)]).size
    assert ahead < loader.data.num_rows // 3
    for name, row_bytes in (("tokens.npy", ROW_BYTES), ("flags.npy", ROW_BYTES // 2)):
        rows, rest = divmod(s3.content_bytes(name) - 128, row_bytes)
        assert rest == 0
        assert read <= rows <= ahead


def test_a_second_run_transfers_no_row_again(open_: Any, s3: S3Server, url: str, monkeypatch) -> None:
    first = open_(url, batch=1)
    batches = [first.step_batches(step) for step in range(3)]
    first.close()
    s3.requests.clear()
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 0)
    second = open_(url, batch=1)
    assert all(same(second.step_batches(step), batches[step]) for step in range(3))
    assert s3.content_bytes("tokens.npy") == 128


def test_rows_damaged_or_half_written_here_are_fetched_again(
    open_: Any, s3: S3Server, url: str, local: PreparedData
) -> None:
    first = open_(url, Loader.dali)
    expected = first.step_batches(0)
    first.close()
    rows = np.unique(first.index.rank_rows(0, 0))
    with open(first.data.tokens_path, "r+b") as file:  # as after a power failure: marked, and the bytes not on the disk
        file.seek(128 + int(rows[0]) * ROW_BYTES)
        file.write(bytes(ROW_BYTES))
    s3.requests.clear()
    again = open_(url, Loader.dali)
    assert same(again.step_batches(0), expected)
    assert s3.content_bytes("tokens.npy") >= 128 + ROW_BYTES


def test_mutant_without_the_sums_the_damage_is_trained_on(open_: Any, url: str, monkeypatch) -> None:
    first = open_(url)
    expected = first.step_batches(0)
    first.close()
    first.data.tokens_path.write_bytes(
        first.data.tokens_path.read_bytes()[:128] + bytes(first.data.num_rows * ROW_BYTES)
    )
    monkeypatch.setattr(RowMirror, "_is_here", lambda self, row: True)
    with pytest.raises(InputError, check=has_id(ErrorId.data_damaged)):
        open_(url).step_batches(0)
    monkeypatch.setattr(PreparedData, "check_row", lambda *args: None)
    assert not same(open_(url).step_batches(0), expected)


def fill(context: RankContext, url: str, pid_file: Path | None = None) -> None:
    """Fetch all rows, in a process of its own."""
    if pid_file is not None:
        pid_file.write_text(str(os.getpid()))
    mirror.GROUP_BYTES = 300  # three rows
    data = open_prepared(url)
    RowMirror(data).ensure(np.arange(data.num_rows))


def test_two_processes_fill_one_mirror(s3: S3Server, url: str, local: PreparedData) -> None:
    run_distributed(partial(fill, url=url), 2)
    folder = open_prepared(url).folder
    for name in ("tokens.npy", "flags.npy"):
        assert (folder / name).read_bytes() == (local.folder / name).read_bytes()


def test_a_process_killed_while_it_fetches_leaves_no_half_row(
    open_: Any, s3: S3Server, url: str, local: PreparedData, tmp_path: Path
) -> None:
    pid_file, seen = tmp_path / "pid", []

    def kill_it(request: Request) -> None:
        seen.append(request)
        if len(seen) == 35:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)

    s3.fault_of = kill_it
    with pytest.raises(RuntimeError, match="rank 0 ended without a report"):
        run_distributed(partial(fill, url=url, pid_file=pid_file), 1)
    data = open_prepared(url)
    kept = sum(map(RowMirror(data)._is_here, range(data.num_rows)))
    assert 0 < kept < data.num_rows
    s3.requests.clear()
    ours, theirs = open_(url), open_(local.folder)
    assert all(same(ours.step_batches(step), theirs.step_batches(step)) for step in range(NUM_STEPS))
    assert s3.content_bytes("tokens.npy") <= 128 + (data.num_rows - kept) * ROW_BYTES


def until_it_raises(loader: TokenLoader, first: int = 0) -> None:
    """Steps until something is told; a thread tells it."""
    until_s = time.monotonic() + 600
    while time.monotonic() < until_s:
        loader.step_batches(first)
        first += 1


def test_a_byte_damaged_in_the_store_is_told_with_its_row(open_: Any, s3: S3Server, url: str, bucket: str) -> None:
    loader = open_(url, eval_fraction=0.0)
    row = int(loader.index.rank_rows(0, 0).flat[0])
    s3.change(bucket, "data/rows/flags.npy", lambda content: flip(content, 128 + row * ROW_BYTES // 2))
    with pytest.raises(InputError, match=rf"{url}: row {row} ", check=has_id(ErrorId.data_damaged)):
        open_(url, eval_fraction=0.0).step_batches(0)


def test_a_file_replaced_during_a_run_is_refused(
    open_: Any, s3: S3Server, url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 1)
    loader = open_(url, batch=1)
    loader.step_batches(0)
    s3.change(bucket, "data/rows/tokens.npy", lambda content: flip(content, 500))
    with pytest.raises(RemoteChanged, match=rf"{url}/tokens.npy: was replaced while it was in use"):
        until_it_raises(loader, first=1)


@pytest.mark.filterwarnings("ignore:reading ahead")
def test_an_outage_is_named_and_survived_when_it_ends(
    open_: Any, s3: S3Server, url: str, fail_first: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 1)
    loader = open_(url, Loader.dali, batch=1)
    batches = loader.step_batches(0)
    fail_first(Fault.reset, "tokens.npy")
    with pytest.raises(RemoteUnavailable, match=rf"{url}/tokens.npy: {s3.proxy} cannot be reached"):
        until_it_raises(loader, first=4)
    s3.fault_of = lambda request: None
    assert same(loader.step_batches(0), batches)
    loader.step_batches(5)


def test_reading_ahead_of_an_outage_warns_and_tries_again(
    open_: Any, s3: S3Server, url: str, fail_first, monkeypatch
) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 2)
    loader = open_(url, batch=1)
    loader.step_batches(0)
    ahead = loader._reader._ahead._ahead
    while not all(future.done() for future in ahead.values()):
        time.sleep(0.01)
    fail_first(Fault.reset, "tokens.npy")
    loader.step_batches(1)  # is here; asks for one step more
    while not all(future.done() for future in ahead.values()):
        time.sleep(0.01)
    s3.fault_of = lambda request: None
    with pytest.warns(UserWarning, match=r"reading ahead of step 3 failed and is tried again: s3://"):
        loader.step_batches(2)
    loader.step_batches(3)


def test_access_lost_during_a_run_is_named(open_: Any, s3: S3Server, url: str, fail_first: Any, monkeypatch) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 1)
    loader = open_(url, batch=1)
    loader.step_batches(0)
    fail_first(Fault.denied, ".npy")
    with pytest.raises(InputError, match=rf"{url}/\w+.npy: access denied"):
        until_it_raises(loader, first=1)


def test_a_full_disk_here_is_named(open_: Any, url: str) -> None:
    loader = open_(url)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (130, hard))
    try:
        with pytest.raises(MachineError, match=r"tokens.npy: cannot be written .*XDG_CACHE_HOME"):
            loader.step_batches(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loader.step_batches(0)


def test_what_does_not_fit_is_refused_at_the_start(
    s3: S3Server, url: str, bucket: str, tmp_path: Path, monkeypatch
) -> None:
    with pytest.raises(InputError, match=r"the run has data.seq_len=64"):
        open_prepared(url, seq_len=64)
    with pytest.raises(RemoteMissing, match=r"data/meta.json: there is no such object .* there is: rows"):
        open_prepared(f"s3://{bucket}/data")
    key = "data/rows/tokens.npy"
    content = s3.client().get_object(Bucket=bucket, Key=key)["Body"].read()
    s3.change(bucket, key, lambda content: content[:-1])
    with pytest.raises(InputError, match=rf"{url}/tokens.npy: \d+ bytes, \d+ rows need \d+: truncated"):
        open_prepared(url)
    s3.change(bucket, key, lambda _: flip(content, 20))
    with pytest.raises(InputError, match="its header is not that of"):
        open_prepared(url)
    s3.change(bucket, key, lambda _: content)
    s3.change(bucket, "data/rows/tokenizer.json", lambda content: content + b" ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(InputError, check=has_id(ErrorId.data_damaged)):
        open_prepared(url)
    s3.change(bucket, "data/rows/meta.json", lambda content: b"{}")
    with pytest.raises(InputError, match=rf"{url}/meta.json: schema_version"):
        open_prepared(url)


def test_the_mirror_itself_is_no_prepared_folder(url: str) -> None:
    data = open_prepared(url)
    with pytest.raises(InputError, match="local copy of some rows of remote data; give the URL"):
        open_prepared(data.folder)


def test_data_info_reads_and_verifies_a_url(s3: S3Server, url: str, bucket: str, local: PreparedData, capsys) -> None:
    assert main(["data", "info", url, "--verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == url
    assert (facts["verified"], facts["digest"]) == (True, local.digest)
    s3.change(bucket, "data/rows/tokens.npy", lambda content: flip(content, 300))
    assert main(["data", "info", url, "--verify"]) == 2
    assert f"{url}: its rows have the digest" in capsys.readouterr().err
    assert main(["data", "prepare", "source=stdlib", "out=s3://bucket/x"]) == 2
    assert "out=s3://bucket/x: is a URL" in capsys.readouterr().err


def test_a_run_on_remote_rows_is_the_run_on_local_ones(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    expected = run_recorded(tiny_job(tmp_path, run="local", train={"steps": 3, "eval_every": 2}))
    address = s3.upload(Path(str(tiny_data(tmp_path / "data").prepared)), bucket, "rows")
    data = {"prepared": address, "loader": Loader.dali}
    ours = run_recorded(tiny_job(tmp_path, run="remote", train={"steps": 3, "eval_every": 2}, data=data))
    assert ours.curve == expected.curve


@pytest.fixture(scope="session")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Rows of 8, 16 and 32 tokens."""
    return open_prepared(str(tiny_bucket_data(tmp_path_factory.mktemp("lengths")).prepared))


@pytest.mark.parametrize(("kind", "rank", "world_size"), [(Loader.memmap, 0, 1), (Loader.dali, 1, 2)])
def test_batches_of_several_lengths_are_those_of_the_local_folder(
    open_: Any, s3: S3Server, bucket: str, lengths: PreparedData, kind: Loader, rank: int, world_size: int
) -> None:
    url = s3.upload(lengths.folder, bucket, "data/lengths")
    options = {"rank": rank, "world_size": world_size, "buckets": FAR}
    ours, theirs = open_(url, kind, **options), open_(lengths.folder, **options)
    second = next(step for step in range(1000) if theirs.epoch_of(step) > 1)
    seen = set()
    for step in (*range(4), *range(second - 4, second + 3), 2, 10**6):  # over the border of an epoch
        batches = ours.step_batches(step)
        seen |= {batch.seq_len for batch in batches}
        assert same(batches, theirs.step_batches(step)), step
    for _ in range(2):
        assert same(ours.eval_batches(4), theirs.eval_batches(4))
    assert seen == set(FAR)


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_lengths_only_the_rows_that_were_read_are_transferred(
    open_: Any, s3: S3Server, bucket: str, lengths: PreparedData, kind: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "STEPS_AHEAD", 1)
    monkeypatch.setattr(loader_module, "STEPS_AHEAD", 1)
    loader = open_(s3.upload(lengths.folder, bucket, "data/lengths"), kind, batch=1, micro=2, buckets=FAR)
    for step in range(4):
        loader.step_batches(step)
    loader.close()
    for place, array in enumerate(lengths.arrays):
        numbers = [turn.number for step in range(4) for turn in loader.index.turns(step) if turn.bucket == place]
        rows_of = [loader.index.streams[place].rank_rows(number, 0) for number in range(len(numbers) + 3)]
        read = np.unique(rows_of[: len(numbers)]).size if numbers else 0
        # One micro-batch of each length is fetched ahead, and DALI itself reads as far ahead.
        ahead = np.unique(rows_of if numbers else []).size
        assert ahead < array.num_rows
        for name, dtype in array.dtypes.items():
            rows, rest = divmod(s3.content_bytes(f"/{name}") - 128, (array.seq_len + 1) * dtype.itemsize)
            assert rest == 0
            assert read <= rows <= ahead, (name, read, rows, ahead)
