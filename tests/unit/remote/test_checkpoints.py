"""Runs and models in an object store: fetched whole, or passed over, or refused by name; and then as local ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from headrace.helpers.s3 import Fault, Request, S3Server
from headrace.helpers.tiers import has_id
from headrace.helpers.training import Bomb, Row, run_distributed, run_recorded, tiny_job
from headrace.platform.cli.main import main
from headrace.platform.cli.remote_run import local_run
from headrace.platform.config.load import load_run_config
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.remote.errors import RemoteMissing
from headrace.workers.data.config import DataConfig
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import iter_weights, load_config
from headrace.workers.model.init_tokenizer import data_for_model
from headrace.workers.model.remote_model import local_model
from headrace.workers.train.checkpoint_folder import CheckpointFolder
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.remote_checkpoint import fetch_checkpoint
from headrace.workers.train.weights import fill_weights

DATA_FILE = "state/rank_00000.safetensors"


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run that was stopped after four of six steps, with checkpoints of steps 2 and 4."""
    job = tiny_job(
        tmp_path_factory.mktemp("stopped"),
        train={"steps": 6},
        checkpoint={"every": 2, "keep": 3},
        model={"init_std": 0.2},
    )
    run_recorded(job, stop_after=4)
    (Path(job.run_dir) / "config.yaml").write_text("run: {}\n")
    return job


@pytest.fixture(scope="session")
def rest(stopped: TrainJob, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What a local resume computes."""
    copy = tmp_path_factory.mktemp("rest") / "run"
    shutil.copytree(stopped.run_dir, copy)
    return run_recorded(replace(stopped, run_dir=str(copy), resume=True)).curve


@pytest.fixture
def url(s3: S3Server, bucket: str, stopped: TrainJob) -> str:
    address = s3.upload(Path(stopped.run_dir), bucket, "runs/mine")
    s3.requests.clear()
    return address


def key_of(step: int, name: str) -> str:
    return f"runs/mine/checkpoints/step_{step:06d}/{name}"


def flip(content: bytes) -> bytes:
    return content[:-50] + bytes([content[-50] ^ 1]) + content[-49:]


def checkpoints(run_dir: Path | str) -> CheckpointFolder:
    return CheckpointFolder(Path(run_dir) / "checkpoints")


def test_a_remote_run_goes_on_to_the_same_bits(
    url: str, stopped: TrainJob, rest: list[Row], tmp_path: Path, capsys
) -> None:
    folder = local_run(url + "/", [], tmp_path / "runs")
    assert folder == str(tmp_path / "runs" / "mine")
    assert (Path(folder) / "config.yaml").read_text() == "run: {}\n"
    assert checkpoints(folder).committed_steps() == [4]
    theirs, ours = checkpoints(stopped.run_dir).path_of(4), checkpoints(folder).path_of(4)
    files = [path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()]
    assert {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()} == set(files)
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)
    assert run_recorded(replace(stopped, run_dir=folder, resume=True)).curve == rest
    assert local_run(url, [], tmp_path / "runs") == folder  # not mixed with the remote one again
    assert "was fetched from" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flipped", "missing", "cut", "marker", "outside"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, s3: S3Server, bucket: str, url: str, tmp_path: Path, capsys
) -> None:
    if damage == "flipped":
        s3.change(bucket, key_of(4, DATA_FILE), flip)
    elif damage == "missing":
        s3.client().delete_object(Bucket=bucket, Key=key_of(4, "rng_00000.json"))
    elif damage == "cut":
        s3.change(bucket, key_of(4, DATA_FILE), lambda content: content[:-1])
    elif damage == "marker":
        s3.change(bucket, key_of(4, "manifest.json"), lambda content: content + b" ")
    else:
        s3.change(bucket, key_of(4, "manifest.json"), lambda content: content.replace(b"rng_00000", b"../../../x"))
        content = s3.client().get_object(Bucket=bucket, Key=key_of(4, "manifest.json"))["Body"].read()
        s3.change(bucket, key_of(4, "COMMITTED"), lambda _: xxhash.xxh3_64(content).hexdigest().encode())
    folder = Path(local_run(url, [], tmp_path) or "")
    assert checkpoints(folder).committed_steps() == [2]
    assert not list(checkpoints(folder).root.glob("*.tmp"))
    assert not list(tmp_path.glob("x*"))
    said = {
        "flipped": f"{DATA_FILE}: digest",
        "missing": "rng_00000.json: is missing",
        "cut": f"{DATA_FILE}: ",
        "marker": "manifest.json: digest",
        "outside": "names a file outside",
    }
    assert f"skipped: {url}/checkpoints/step_000004/" in (err := capsys.readouterr().err)
    assert said[damage] in err
    # Nothing is fetched of what the listing or the manifest already shows to be no good.
    assert (s3.content_bytes(key_of(4, DATA_FILE)) > 0) == (damage == "flipped")


@pytest.mark.parametrize("name", [DATA_FILE, "rng_00000.json", "manifest.json", "tokenizer.json"])
def test_a_hostile_run_in_the_store_executes_nothing(
    name: str, s3: S3Server, bucket: str, url: str, tmp_path: Path, capsys
) -> None:
    """Every digest is right, and one file is a pickle that makes a folder."""
    canary = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(canary))
    s3.change(bucket, key_of(4, name), lambda _: bomb)

    def fit(content: bytes) -> bytes:
        values = json.loads(content)
        for entry in values["files"]:
            if entry["path"] == name:
                entry |= {"num_bytes": len(bomb), "xxh3": xxhash.xxh3_64(bomb).hexdigest()}
        return json.dumps(values).encode()

    if name != "manifest.json":
        s3.change(bucket, key_of(4, "manifest.json"), fit)
    content = s3.client().get_object(Bucket=bucket, Key=key_of(4, "manifest.json"))["Body"].read()
    s3.change(bucket, key_of(4, "COMMITTED"), lambda _: xxhash.xxh3_64(content).hexdigest().encode())
    is_read = name != "rng_00000.json"
    assert main(["generate", f"run={url}", "step=4", "--prompt", "the", "max_new_tokens=1"]) == (2 if is_read else 0)
    assert main(["export", f"run={url}", "step=4", f"out={tmp_path / 'out'}"]) == (2 if is_read else 0)
    assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()


def test_readers_of_weights_take_a_url_and_warn_about_damage(
    s3: S3Server, bucket: str, url: str, stopped: TrainJob
) -> None:
    def weights(run: str, step: int | None = None) -> dict[str, torch.Tensor]:
        return dict(read_model_state(run, step).tensors)

    newest, older = weights(stopped.run_dir), weights(stopped.run_dir, 2)
    assert all(torch.equal(tensor, newest[name]) for name, tensor in weights(url).items())
    s3.requests.clear()
    assert all(torch.equal(tensor, older[name]) for name, tensor in weights(url, 2).items())
    weights(url)
    assert s3.content_bytes(key_of(4, DATA_FILE)) == 0  # it was here
    with pytest.raises(InputError, match=rf"{url}/checkpoints: no committed checkpoint of step 3; there is \[4, 2\]"):
        weights(url, 3)
    s3.change(bucket, key_of(4, DATA_FILE), flip)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    with pytest.warns(UserWarning, match=rf"newer checkpoints are damaged \({url}/.*using step 2"):
        assert all(torch.equal(tensor, older[name]) for name, tensor in weights(url).items())
    with pytest.raises(InputError, match=f"{url}/checkpoints: {url}/checkpoints/step_000004/{DATA_FILE}: digest"):
        weights(url, 4)


def test_a_fetched_copy_that_was_damaged_here_is_fetched_again(url: str, tmp_path: Path) -> None:
    fetch_checkpoint(url, tmp_path / "run")
    folder = checkpoints(tmp_path / "run")
    path = folder.path_of(4) / DATA_FILE
    path.write_bytes(flip(path.read_bytes()))
    manifest, damages = fetch_checkpoint(url, tmp_path / "run")
    assert (manifest.step, damages, folder.verify(manifest)) == (4, [], [])


def test_nothing_whole_there_is_refused(s3: S3Server, bucket: str, url: str, tmp_path: Path, fail_first: Any) -> None:
    for step in (2, 4):
        s3.change(bucket, key_of(step, DATA_FILE), flip)
    with pytest.raises(
        InputError, match=r"step_000004/.*digest.*step_000002/.*give the folder of a run that saved one"
    ):
        local_run(url, [], tmp_path / "runs")
    assert not (tmp_path / "runs" / "mine" / "config.yaml").exists()
    with pytest.raises(RemoteMissing, match=rf"s3://{bucket}/runs/checkpoints: there is nothing.*there is: mine"):
        fetch_checkpoint(f"s3://{bucket}/runs", tmp_path / "run")
    fail_first(Fault.denied, "config.yaml")
    with pytest.raises(InputError, match=rf"{url}/config.yaml: access denied"):
        local_run(url, [], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def fetch(context: RankContext, url: str, folder: Path, pid_file: Path) -> None:
    """fetch_checkpoint, in a process of its own."""
    pid_file.write_text(str(os.getpid()))
    fetch_checkpoint(url, folder)


def test_a_killed_fetch_leaves_no_checkpoint_and_goes_on(s3: S3Server, url: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    last = json.loads((checkpoints_of(url, s3)).decode())["files"][-1]["path"]

    def kill_it(request: Request) -> None:
        if request.method == "GET" and request.path.endswith(key_of(4, last)):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)

    s3.fault_of = kill_it
    with pytest.raises(RuntimeError, match="rank 0 ended without a report"):
        run_distributed(partial(fetch, url=url, folder=tmp_path / "run", pid_file=pid_file), 1)
    folder = checkpoints(tmp_path / "run")
    assert folder.committed_steps() == []
    assert [path.name for path in folder.root.iterdir()] == ["step_000004.tmp"]
    with pytest.raises(InputError, match="no committed checkpoint there"):
        read_model_state(tmp_path / "run")
    s3.fault_of = lambda request: None
    s3.requests.clear()
    manifest, _ = fetch_checkpoint(url, tmp_path / "run")
    assert folder.verify(manifest) == []
    fetched = {
        r.path.rpartition("step_000004/")[2] for r in s3.requests if r.method == "GET" and "step_000004/" in r.path
    }
    assert fetched == {"COMMITTED", "manifest.json", last}


def checkpoints_of(url: str, s3: S3Server) -> bytes:
    """The manifest of step 4."""
    bucket = url.split("/")[2]
    return s3.client().get_object(Bucket=bucket, Key=key_of(4, "manifest.json"))["Body"].read()


def test_the_local_folder_of_a_remote_run(url: str, tmp_path: Path) -> None:
    assert local_run(None, []) is None
    assert local_run("runs/mine", []) == "runs/mine"
    wanted = tmp_path / "elsewhere"
    assert local_run(url, ["train.steps=9", f"run.dir={wanted}"], tmp_path / "runs") == str(wanted)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("run: {}\n")
    with pytest.raises(InputError, match=r"mine is there and was not fetched from that URL; give .* run.dir=DIR"):
        local_run(url, [], tmp_path / "runs")


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def call(*argv: str) -> dict[str, Any]:
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_generate_export_and_init_from_take_urls(
    s3: S3Server, bucket: str, url: str, stopped: TrainJob, tmp_path: Path, answer: Any, capsys
) -> None:
    words = ("--prompt", "the river turns", "max_new_tokens=5")
    expected = answer("generate", f"run={stopped.run_dir}", *words)["tokens"]
    assert answer("generate", f"run={url}", *words)["tokens"] == expected
    answer("export", f"run={url}", f"out={tmp_path / 'hf'}")
    assert main(["export", f"run={url}", "out=s3://bucket/hf"]) == 2
    assert "out=s3://bucket/hf: is a URL" in capsys.readouterr().err

    model = s3.upload(tmp_path / "hf", bucket, "models/tiny")
    s3.requests.clear()
    tokenizer = Path(str(data_for_model(DataConfig(name="t"), model).tokenizer))
    assert (tokenizer / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert s3.content_bytes(".safetensors") == 0
    assert answer("generate", f"hf={model}", *words)["tokens"] == expected
    config = load_config(tmp_path / "hf")
    local = dict(iter_weights(tmp_path / "hf", config))
    s3.requests.clear()
    assert all(torch.equal(tensor, local[name]) for name, tensor in iter_weights(model, config))
    assert s3.content_bytes(".safetensors") == 0  # it was here
    loaded = load_run_config([f"model.init_from={model}"], environ={})
    wanted = loaded.config.model
    assert wanted == replace(config, init_from=model, name=wanted.name)
    decoder = Decoder(wanted, device="meta")
    fill_weights(decoder, wanted, seed=0, device=torch.device("cpu"))
    assert all(torch.equal(tensor, local[name]) for name, tensor in decoder.named_parameters())
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_contradicted), match=r"model.num_layers=9"):
        load_run_config([f"model.init_from={model}", "model.num_layers=9"], environ={})


def test_a_model_that_is_replaced_is_fetched_anew(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").write_text("left where it is")
    model = s3.upload(tmp_path / "m", bucket, "m")
    first = local_model(model)
    assert [path.name for path in first.iterdir()] == ["config.json"]
    assert first.name == "m"
    s3.change(bucket, "m/config.json", lambda content: b"[]")
    assert (local_model(model) / "config.json").read_text() == "[]"
    assert (first / "config.json").read_text() == "{}"
    s3.client().delete_object(Bucket=bucket, Key="m/config.json")
    with pytest.raises(InputError, match=rf"{model}/config.json: missing; give the URL of a Hugging Face"):
        local_model(model)
    assert local_model("runs/x") == Path("runs/x")
