"""A run from pretrained weights takes their tokenizer; another one is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.cli import train
from headrace.platform.cli.main import main
from headrace.platform.config.load import config_text, load_run_config
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.prepare import prepare, prepare_into
from headrace.workers.data.sources import find_source
from headrace.workers.data.tokenizing import train_bpe
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import initial_weights
from headrace.workers.model.hf import save_pretrained
from headrace.workers.model.init_tokenizer import data_for_model


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"the river turns wheel {i}"}) + "\n" for i in range(50)))
    return DataConfig(name="t", source=str(path), bpe_vocab_size=300, seq_len=16, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path, data: DataConfig) -> Path:
    """A Hugging Face folder with a tokenizer of its own."""
    config: ModelConfig = load_run_config(["debug=cpu_tiny", "model.vocab_size=290"], environ={}).config.model
    files = train_bpe(find_source(data), 290)
    folder = tmp_path / "model"
    save_pretrained(initial_weights(config, 0), config, folder, tokenizer=files.contents)
    return folder


def test_the_tokenizer_of_the_model_is_the_default(model: Path, data: DataConfig, capsys) -> None:
    assert data_for_model(data, None) == data
    found = prepare(data_for_model(data, str(model)))
    assert found.tokenizer_path.read_bytes() == (model / "tokenizer.json").read_bytes()
    words = ["debug=cpu_tiny", "model.vocab_size=290", f"model.init_from={model}", f"data.source={data.source}"]
    assert main(["train", "--dry-run", *words]) == 0
    assert f"tokenizer: {model}" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["tokenizer", "prepared"])
def test_another_tokenizer_is_refused(key: str, model: Path, data: DataConfig, tmp_path: Path, capsys) -> None:
    rows = prepare_into(data, tmp_path / "rows").folder
    words = [
        "debug=cpu_tiny",
        "model.vocab_size=290",
        f"model.init_from={model}",
        "data.seq_len=16",
        f"data.{key}={rows}",
    ]
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"data.{key}={rows}" in said
    assert "data.allow_other_tokenizer" in said
    assert sorted(tmp_path.rglob("*")) == before
    given = DataConfig(name="t", **{key: str(rows)})
    with pytest.raises(InputError, check=has_id(ErrorId.other_tokenizer)):
        data_for_model(given, str(model))
    given.allow_other_tokenizer = True
    assert data_for_model(given, str(model)) == given
    (rows / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    if key == "tokenizer":
        given.allow_other_tokenizer = False
        assert data_for_model(given, str(model)) == given


def test_a_model_without_a_tokenizer(model: Path, data: DataConfig, tmp_path: Path) -> None:
    (model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="init_from", check=has_id(ErrorId.other_tokenizer)):
        data_for_model(data, str(model))
    data.tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.warns(UserWarning, match="data.tokenizer"):
        assert data_for_model(data, str(model)) == data


def test_ids_beyond_the_vocabulary_do_not_lead_to_other_embeddings(data: DataConfig) -> None:
    with pytest.raises(InputError, match="without pretrained weights", check=has_id(ErrorId.other_tokenizer)):
        prepare(data).check_vocab(10)


def test_a_resumed_run_needs_no_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: DataConfig) -> None:
    words = ["debug=cpu_tiny", "model.vocab_size=300", "data.seq_len=16", f"data.prepared={prepare(data).folder}"]
    config = load_run_config(words, environ={}).config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config_text(config))
    monkeypatch.setattr(train, "data_for_model", None)
    assert main(["train", "--resume", "run", "--dry-run"]) == 0
