"""`headrace eval` on a run that was trained for a step, its export, and the first weights of a configuration."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from headrace.helpers.training import tiny_job
from headrace.platform.cli import eval as verb
from headrace.platform.cli.eval_subject import Subject
from headrace.platform.cli.main import main
from headrace.platform.config.load import config_text, load_run_config, load_saved_config
from headrace.workers.data.loader import open_loader
from headrace.workers.job import RankContext
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.sharded import copy_weights
from headrace.workers.train.config import TrainConfig
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.session import run_rank


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("drives")))
        job = tiny_job(
            tmp_path_factory.mktemp("evaluated"),
            train={"steps": 1},
            checkpoint={"at_end": True},
            model={"init_std": 0.2},
        )
        run_rank(job, RankContext(), on_step=lambda report: None, should_stop=lambda: False)
        config = load_run_config(["tracking=files"], environ={}).config
        config = replace(
            config, model=job.model, data=job.data, train=replace(config.train, loss_tile=32, num_threads=1)
        )
        (Path(job.run_dir) / "config.yaml").write_text(config_text(config))
    return Path(job.run_dir)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["eval", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["eval", *argv]) == 2
    return capsys.readouterr().err


def model_of(run_dir: Path) -> Decoder:
    state = read_model_state(run_dir)
    model = Decoder(state.config, dtype=torch.float64)
    copy_weights(model, state.tensors)
    return model


def plain_loss(model: Decoder, data: Any, split: str, num_rows: int) -> tuple[int, float]:
    """Targets and mean loss in fp64, rows one by one, without any sweep."""
    loader = open_loader(
        data, train=TrainConfig(batch_size=1, micro_batches=1, seed=0), rank=0, world_size=1, split=split
    )
    num_targets, total = 0, 0.0
    for row in range(num_rows):
        (batch,) = loader.step_batches(row)
        with torch.no_grad():
            logits = model(batch.tokens, packing=batch.packing)
        total += float(F.cross_entropy(logits[0], batch.targets[0], reduction="sum", ignore_index=-100))
        num_targets += batch.num_targets
    loader.close()
    return num_targets, total / num_targets


def test_a_run_is_evaluated_on_the_rows_that_it_held_out(run_dir: Path, capsys) -> None:
    data = load_saved(run_dir).data
    held_out = open_loader(data, train=TrainConfig(batch_size=1), rank=0, world_size=1, split="eval").index.epoch_rows
    num_targets, loss = plain_loss(model_of(run_dir), data, "eval", held_out)
    words = (f"run={run_dir}", "dtype=fp64", "position_bucket=8")
    found = answer(capsys, *words, "chunk_size=10")
    assert (found["split"], found["rows"], found["tokens"]) == ("held_out", held_out, num_targets)
    assert (found["step"], found["memory"], found["chunk_size"]) == (1, "chunk", 10)
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
    rows = found["by_position"]
    assert [(row["begin"], row["end"]) for row in rows] == [(0, 8), (8, 16), (16, 32)][: len(rows)]
    assert sum(row["tokens"] for row in rows) == num_targets
    assert sum(row["tokens"] * row["loss"] for row in rows) / num_targets == pytest.approx(loss, rel=1e-12)
    assert json.loads(Path(found["json"]).read_text()) == found
    assert Path(found["json"]).parent == run_dir / "eval"
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    by_place = {"host": "chunk_host", "ssd": "chunk_ssd"}
    for place, memory in by_place.items():
        other = answer(capsys, *words, "chunk_size=10", f"memory={memory}", f"out={run_dir.parent / memory}")
        assert (other["loss"], other["by_position"]) == (found["loss"], rows)
        assert other["moved_bytes"][f"store/{place}"] > 0
        assert Path(other["picture"]).parent == run_dir.parent / memory
    by_layer = answer(capsys, *words, "memory=recompute", "rows=2")
    assert (by_layer["rows"], by_layer["chunk_size"]) == (2, None)
    assert by_layer["loss"] == pytest.approx(plain_loss(model_of(run_dir), data, "eval", 2)[1], rel=1e-12)


def load_saved(run_dir: Path) -> Any:
    return load_saved_config(run_dir / "config.yaml", environ={}).config


def test_other_lengths_and_other_data_are_prepared_with_the_tokenizer_of_the_run(run_dir: Path, capsys) -> None:
    assert main(["eval", f"run={run_dir}", "data.seq_len=48", "chunk_size=16", "rows=2"]) == 0
    done = capsys.readouterr()
    assert "rows are held out by number" in done.err
    assert "2 row(s) of 48 tokens" in done.out
    assert "perplexity" in done.out
    source = load_saved(run_dir).data.source
    found = answer(capsys, f"run={run_dir}", f"data.source={source}", "data.seq_len=40", "dtype=fp64", "chunk_size=16")
    data = replace(load_saved(run_dir).data, prepared=found["data"]["folder"], seq_len=40, eval_fraction=0.0)
    num_targets, loss = plain_loss(model_of(run_dir), data, "train", found["rows"])
    assert (found["split"], found["tokens"]) == ("all", num_targets)
    assert found["loss"] == pytest.approx(loss, rel=1e-12)


def test_an_export_and_the_first_weights_of_a_configuration(run_dir: Path, tmp_path: Path, capsys) -> None:
    assert main(["export", f"run={run_dir}", f"out={tmp_path / 'hf'}"]) == 0
    capsys.readouterr()
    saved = load_saved(run_dir)
    words = (f"data.prepared={saved.data.prepared}", "data.seq_len=32", "rows=3", "dtype=fp64", "tracking=files")
    from_run = answer(capsys, f"run={run_dir}", *words[:-1])
    from_hf = answer(capsys, f"hf={tmp_path / 'hf'}", *words)
    assert (from_hf["loss"], from_hf["tokens"]) == (from_run["loss"], from_run["tokens"])
    assert (from_hf["step"], from_hf["split"]) == (None, "all")
    assert Path(from_hf["json"]).parent == tmp_path / "runs" / "eval"
    words = ("model=tiny", "hardware=cpu", *words, f"model.vocab_size={saved.model.vocab_size}", "train.seed=5")
    first = answer(capsys, *words)
    model = Decoder(load_run_config([w for w in words if w[:4] not in ("rows", "dtyp")], environ={}).config.model)
    model.init_weights(5)
    data = replace(saved.data, eval_fraction=0.0)
    assert first["loss"] == pytest.approx(plain_loss(model.double(), data, "train", 3)[1], rel=1e-12)


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("chunk_ssd", "chunk_ssd"),
        ("chunk_auto", "chunk_host"),
        ("chunk_sparse", "chunk_host"),
        ("keep", "chunk"),
        ("auto", "chunk"),
    ],
)
def test_the_memory_of_a_run_is_the_default(run_dir: Path, trained: str, evaluated: str) -> None:
    loaded = load_saved_config(run_dir / "config.yaml", [f"memory={trained}"], environ={})
    assert verb._eval_config({}, [], Subject(loaded, run_dir)).memory.value == evaluated


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=RUN", "hf=x"], "give one of them"),
        (["step=3"], "step=3: the step of a run's checkpoint"),
        (["run=RUN", "step=7"], "7"),
        (["run=RUN", "memory=auto"], "memory=auto: a plan solved for a training step"),
        (["run=RUN", "memory=chunk_auto"], "memory=chunk_auto: a plan solved for a training step"),
        (["run=RUN", "memory=chunk_sparse"], "memory=chunk_sparse: an evaluation reads every page; choose"),
        (["run=RUN", "rows=0"], "rows=0: a whole number of at least 1"),
        (["run=RUN", "chunk_size=x"], "chunk_size=x: a whole number is wanted"),
        (["run=RUN", "split=test"], "split=test: one of held_out, all"),
        (["run=RUN", "dtype=fp8"], "dtype=fp8: one of fp64, fp32, bf16"),
        (["run=RUN", "data.seqlen=4"], "did you mean `data.seq_len`?"),
        (["run=nowhere"], "run=nowhere: no such folder"),
        (["run=RUN", "data.buckets=[16,32]"], "eval reads rows of one length; add data.buckets=[]"),
        (
            ["run=RUN", "memory=chunk_host", "chunk_size=4", "tiers.host.budget_gib=0"],
            "tiers.host.budget_gib=0: keys and values",
        ),
        (["hf=nowhere"], "nowhere"),
    ],
)
def test_what_is_refused(run_dir: Path, words: list[str], said: str, capsys) -> None:
    assert said in refusal(capsys, *(word.replace("RUN", str(run_dir)) for word in words))


def test_data_of_another_tokenizer_is_refused(run_dir: Path, tmp_path: Path, capsys) -> None:
    source = tmp_path / "other.txt"
    source.write_text("quite another text about nothing " * 400)
    assert main(["data", "prepare", f"source={source}", f"out={tmp_path / 'rows'}", "seq_len=32"]) == 0
    capsys.readouterr()
    words = (f"run={run_dir}", f"data.prepared={tmp_path / 'rows'}")
    assert "is not that of the run" in refusal(capsys, *words)


def test_a_loss_that_is_not_finite_is_a_failure(run_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *args, **options: forward(*args, **options) * math.nan)
    assert main(["eval", f"run={run_dir}", "rows=1", "--json"]) == 1
    done = capsys.readouterr()
    assert json.loads(done.out.splitlines()[-1])["loss"] is None
    assert "the loss is nan" in done.err


def test_by_layer_and_by_one_chunk_no_tier_is_needed(run_dir: Path, capsys) -> None:
    """A pass without backward holds nothing, and the keys of one chunk never leave the device."""
    losses = {answer(capsys, f"run={run_dir}", f"memory={name}")["loss"] for name in ("keep", "offload_host", "memo")}
    assert len(losses) == 1
    alone, off = (
        answer(capsys, f"run={run_dir}", memory, "tiers.host.budget_gib=0")
        for memory in ("memory=chunk", "memory=chunk_host")
    )
    assert off["loss"] == alone["loss"]
