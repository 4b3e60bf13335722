"""Run folders made to harm: every digest is right, and what the files hold is not what it should be.

Each verb that reads one ends in exit code 2 and a sentence, or reads what is good; nothing in it is executed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from headrace.helpers.training import Bomb, run_recorded, tiny_job
from headrace.platform.cli.main import main
from headrace.storage.core.errors import InputError
from headrace.workers.job import TrainJob
from headrace.workers.train.checkpoint_folder import CheckpointFolder, describe_files

STEP = "step_000002"
STATE, GENERATORS = "state/rank_00000.safetensors", "rng_00000.json"
DEEP = b"[" * 200_000
Attack = Callable[[Path, bytes], object]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    job = tiny_job(tmp_path_factory.mktemp("run"), train={"steps": 3}, checkpoint={"every": 2})
    run_recorded(job, stop_after=2)
    return job


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Give a checkpoint a manifest and a marker that fit its files, as whoever made it can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    entries = describe_files(folder, [name for name in names if name not in ("manifest.json", "COMMITTED")])
    manifest["files"] = [asdict(entry) for entry in entries]
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    mark(folder)


def mark(folder: Path) -> None:
    (folder / "COMMITTED").write_text(xxhash.xxh3_64((folder / "manifest.json").read_bytes()).hexdigest())


def target_of(bomb: bytes) -> Path:
    """The path that a bomb would make."""
    texts = [argument for code, argument, _ in pickletools.genops(bomb) if "UNICODE" in code.name]
    return Path(texts[-1])


def replaced(name: str) -> Attack:
    """Put the pickle in place of a file."""

    def attack(folder: Path, bomb: bytes) -> None:
        (folder / name).write_bytes(bomb)
        seal(folder)

    return attack


def content(name: str, data: bytes) -> Attack:
    def attack(folder: Path, bomb: bytes) -> None:
        (folder / name).write_bytes(data)
        seal(folder)

    return attack


def old_files(folder: Path, bomb: bytes) -> None:
    """What torch.distributed.checkpoint and torch.save would have written."""
    for name in ("state/.metadata", "state/__0_0.distcp", "state/.rank0.metadata", "rng_00000.pt"):
        (folder / name).write_bytes(bomb)
    seal(folder)


def zipped(name: str) -> Attack:
    """The pickle inside of torch's own container."""

    def attack(folder: Path, bomb: bytes) -> None:
        canary = target_of(bomb)
        buffer = io.BytesIO()
        torch.save(Bomb(canary), buffer)
        (folder / name).write_bytes(buffer.getvalue())
        seal(folder)

    return attack


def header(change: Callable[[dict[str, Any]], object]) -> Attack:
    """Another header before the same numbers."""

    def attack(folder: Path, bomb: bytes) -> None:
        raw = (folder / STATE).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        values = json.loads(raw[8 : 8 + length])
        change(values)
        text = json.dumps(values).encode()
        (folder / STATE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        seal(folder)

    return attack


def sharding(text: str) -> Attack:
    return header(lambda values: values["__metadata__"].update(DCP_SHARDING_INFO=text))


def manifest(**changes: Any) -> Attack:
    return lambda folder, bomb: seal(folder, lambda values: values.update(changes))


def model(**changes: Any) -> Attack:
    return lambda folder, bomb: seal(folder, lambda values: values["model"].update(changes))


def raw_manifest(make: Callable[[Path, bytes], object]) -> Attack:
    """Something else in place of manifest.json, with a marker that fits where one can."""

    def attack(folder: Path, bomb: bytes) -> None:
        path = folder / "manifest.json"
        path.unlink()
        make(path, bomb)
        if path.is_file():
            mark(folder)

    return attack


def pipe(name: str) -> Attack:
    """A named pipe in place of an empty file: who opens it waits for ever."""

    def attack(folder: Path, bomb: bytes) -> None:
        (folder / name).write_bytes(b"")
        seal(folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def far_offset(values: dict[str, Any]) -> None:
    name = next(name for name in values if name.startswith("model."))
    offsets = json.loads(values["__metadata__"]["DCP_SHARDING_INFO"])
    offsets[name]["saved_offsets"] = [2**40 for _ in offsets[name]["saved_offsets"]]
    values["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)


def large_shape(values: dict[str, Any]) -> None:
    name = next(name for name in values if name.startswith("model."))
    values[name]["shape"] = [2**50, 2**50]


ATTACKS: dict[str, Attack] = {
    "state is a pickle": replaced(STATE),
    "generators are a pickle": replaced(GENERATORS),
    "tokenizer is a pickle": replaced("tokenizer.json"),
    "manifest is a pickle": raw_manifest(lambda path, bomb: path.write_bytes(bomb)),
    "files of torch beside it": old_files,
    "state is torch's zip": zipped(STATE),
    "generators are torch's zip": zipped(GENERATORS),
    "state is empty": content(STATE, b""),
    "state has a long header": content(STATE, struct.pack("<Q", 2**63) + b"{}"),
    "state has a deep header": content(STATE, struct.pack("<Q", len(DEEP)) + DEEP),
    "generators are deep JSON": content(GENERATORS, DEEP),
    "generators are a list": content(GENERATORS, b"[]"),
    "tokenizer is deep JSON": content("tokenizer.json", DEEP),
    "parts lie far away": header(far_offset),
    "a tensor is very large": header(large_shape),
    "offsets are text": sharding("no JSON"),
    "offsets are deep JSON": sharding(DEEP.decode()),
    "offsets are missing": sharding('{"x": {}}'),
    "offsets are a list": sharding("[1]"),
    "manifest of another step": manifest(step=1),
    "manifest with text for a number": manifest(world_size="two"),
    "manifest without files": manifest(files=[]),
    "manifest with a file outside": manifest(files=[{"path": "../../x", "num_bytes": 0, "xxh3": ""}]),
    "manifest with files that are none": manifest(files=[{"path": ["x"], "num_bytes": None, "xxh3": 1}]),
    "manifest with a list as model": manifest(model=[]),
    "manifest is a list": raw_manifest(lambda path, bomb: path.write_text("[]")),
    "manifest is deep JSON": raw_manifest(lambda path, bomb: path.write_bytes(DEEP)),
    "manifest is a pipe": raw_manifest(lambda path, bomb: os.mkfifo(path)),
    "manifest is a device": raw_manifest(lambda path, bomb: path.symlink_to("/dev/zero")),
    "manifest is a folder": raw_manifest(lambda path, bomb: path.mkdir()),
    "model of a billion layers": model(num_layers=10**9),
    "model of no layers": model(num_layers=0),
    "model with text for a number": model(hidden_size="64"),
    "model with a false family": model(family="trojan"),
    "model with an unknown key": model(run_me="x"),
    "state is a pipe": pipe(STATE),
    "generators are a pipe": pipe(GENERATORS),
}
# What a verb does not read cannot harm it: it does its work.
HARMLESS = {
    "generators are a pickle": {"export", "generate"},
    "generators are torch's zip": {"export", "generate"},
    "generators are deep JSON": {"export", "generate"},
    "generators are a list": {"export", "generate"},
    "files of torch beside it": {"export", "generate", "resume"},
    "tokenizer is a pickle": {"resume"},
    "tokenizer is deep JSON": {"resume"},
    # The model of a resumed run is that of its config.yaml.
    **{name: {"resume"} for name in ATTACKS if name.startswith("model ")},
}


def hostile(job: TrainJob, folder: Path, attack: str) -> tuple[Path, Path]:
    """A copy of the run with an attack in it; and the path that a successful one makes."""
    run_dir, canary = folder / "run", folder / "executed"
    shutil.copytree(job.run_dir, run_dir)
    ATTACKS[attack](run_dir / "checkpoints" / STEP, pickle.dumps(Bomb(canary)))
    return run_dir, canary


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_run_ends_in_a_sentence(attack: str, finished: TrainJob, tmp_path: Path, capsys) -> None:
    run_dir, canary = hostile(finished, tmp_path, attack)
    verbs = {"generate": ["--prompt", "the", "max_new_tokens=1"], "export": [f"out={tmp_path / 'out'}"]}
    for verb, words in verbs.items():
        code = main([verb, f"run={run_dir}", *words])
        said = capsys.readouterr().err
        assert code == (0 if verb in HARMLESS.get(attack, set()) else 2), said
        assert code == 0 or said.startswith(f"headrace {verb}: "), said
        assert "Traceback" not in said
        assert not canary.exists()
    assert (tmp_path / "out").exists() == ("export" in HARMLESS.get(attack, set()))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_run_is_not_gone_on_with(attack: str, finished: TrainJob, tmp_path: Path) -> None:
    run_dir, canary = hostile(finished, tmp_path, attack)
    job = replace(finished, run_dir=str(run_dir), resume=True)
    if "resume" in HARMLESS.get(attack, set()):
        assert len(run_recorded(job).curve) == 1
    else:
        with pytest.raises(InputError):
            run_recorded(job)
        assert CheckpointFolder(run_dir / "checkpoints").committed_steps() == [2]
    assert not canary.exists()


def test_the_bomb_goes_off_where_something_unpickles_it(tmp_path: Path) -> None:
    """What the tests above would see."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()
