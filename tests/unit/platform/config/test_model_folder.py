"""`model.init_from`: the folder's shape, what contradicts it, and folders that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.config.load import LoadedConfig, load_run_config, load_saved_config
from headrace.platform.config.rules import check_trainable
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.model.config import AdapterConfig, AdapterKind, Family, ModelConfig, RopeScaling
from headrace.workers.model.hf_config import config_to_hf, load_config
from headrace.workers.model.peft_config import peft_config

SHAPE: dict[str, Any] = {
    "name": "mine",
    "vocab_size": 300,
    "hidden_size": 96,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 3,
    "intermediate_size": 80,
    "rms_norm_eps": 3e-6,
    "rope_theta": 5e4,
    "max_position_embeddings": 8192,
    "init_std": 0.03,
}
MODELS = {
    "llama": ModelConfig(family=Family.llama, tie_embeddings=True, rope_scaling=RopeScaling(factor=4.0), **SHAPE),
    "qwen2": ModelConfig(family=Family.qwen2, qkv_bias=True, sliding_window=50, **SHAPE),
    "qwen3": ModelConfig(family=Family.qwen3, qk_norm=True, head_dim=32, pad_token_id=7, **SHAPE),
    "mistral": ModelConfig(family=Family.mistral, sliding_window=64, **SHAPE),
}


def load(*words: str) -> LoadedConfig:
    return load_run_config(words, environ={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, MODELS["llama"])


def write(tmp_path: Path, model: ModelConfig, **more: Any) -> Path:
    folder = tmp_path / model.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_to_hf(model, "float32"), **more}))
    return folder


@pytest.mark.parametrize("family", MODELS)
def test_the_folder_gives_the_whole_shape(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path, MODELS[family])
    loaded = load(f"model.init_from={folder}")
    model = loaded.config.model
    assert replace(model, head_dim=model.head_size) == replace(
        MODELS[family], head_dim=model.head_size, init_from=str(folder)
    )
    assert model == replace(load_config(folder), init_from=str(folder))
    assert (loaded.choices, loaded.warnings) == ({"experiment": "finetune"}, ())
    (tmp_path / "config.yaml").write_text(loaded.text)
    folder.rename(tmp_path / "gone")
    assert load_saved_config(tmp_path / "config.yaml", environ={}).config == loaded.config


def test_a_relative_folder_is_found_from_everywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert load("model.init_from=mine").config.model.init_from == str(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load("model.init_from=~/mine").config.model.init_from == str(folder)


def test_a_folder_brings_the_settings_for_trained_weights(folder: Path) -> None:
    config = load(f"model.init_from={folder}").config
    assert (config.optim.lr, config.tiers.device.budget_gib) == (1e-5, None)
    assert load(f"model.init_from={folder}", "hardware=h200", "train=bf16").config.optim.lr == 1e-5
    assert load("model.init_from=null").choices == {"experiment": "default"}
    assert load(f"model.init_from={folder}", "experiment=default").config.model.hidden_size == 96


def test_every_key_that_contradicts_the_folder_is_named_at_once(folder: Path) -> None:
    words = ("model.hidden_size=256", "model.num_heads=0", "model.family=qwen2", "model.qkv_bias=true")
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_contradicted)) as caught:
        load(f"model.init_from={folder}", *words, "model.num_layers=3", "model.rope_theta=7")
    lines = str(caught.value).split("\n")
    assert [line.split(":")[0] for line in lines[:-1]] == [
        "model.family=qwen2",
        "model.hidden_size=256",
        "model.num_heads=0",
        "model.qkv_bias=True",
    ]
    assert str(folder) in lines[-1]


@pytest.mark.parametrize(
    "key", ["vocab_size=0", "num_layers=2", "num_kv_heads=2", "head_dim=8", "tie_embeddings=False"]
)
def test_each_size_may_contradict(key: str, folder: Path) -> None:
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_contradicted), match=rf"^model\.{key}"):
        load(f"model.init_from={folder}", f"model.{key}")


@pytest.mark.parametrize("word", ["model=qwen2_5_7b", "experiment=qwen2_5_7b_32k_1xh200"])
def test_a_chosen_model_contradicts_as_keys_do(word: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_contradicted)) as caught:
        load(f"model.init_from={folder}", word)
    assert "model.hidden_size=3584" in str(caught.value)
    assert "model=qwen2_5_7b" in str(caught.value)
    same = write(tmp_path, replace(load("model=qwen2_5_7b").config.model, name="same", max_position_embeddings=32768))
    model = load(f"model.init_from={same}", word).config.model
    assert (model.hidden_size, model.max_position_embeddings) == (3584, 32768)


def test_numbers_of_a_formula_may_be_changed_and_it_is_said(folder: Path) -> None:
    loaded = load(f"model.init_from={folder}", "model.rope_theta=1e6", "model.rope_scaling.factor=8")
    assert loaded.config.model.rope_scaling == RopeScaling(factor=8.0)  # the folder's own values beside it
    assert [warning.split("=")[0] for warning in loaded.warnings] == ["model.rope_theta", "model.rope_scaling"]
    assert load(f"model.init_from={folder}", "model.max_position_embeddings=99999", "model.name=x").warnings == ()


def test_an_experiment_may_say_more_about_the_model(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"model:\n  init_from: {folder}\n  rope_theta: 1.0e6\n")
    assert load(f"conf={recipe}").config.model.rope_theta == 1e6
    recipe.write_text(f"model:\n  init_from: {folder}\n  num_layers: 9\n  hidden_size: 32\n")
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_contradicted)) as caught:
        load(f"conf={recipe}")
    assert "num_layers=9" in str(caught.value)
    assert "hidden_size=32" in str(caught.value)


VERBS = {
    "plan": ["plan", "model.init_from={}"],
    "train": ["train", "model.init_from={}", "cluster=inline"],
    "verify": ["verify", "hf={}"],
    "generate": ["generate", "hf={}", "--prompt", "x"],
    "generate run": ["generate", "run={}", "--prompt", "x"],
    "export": ["export", "run={}", "out=out"],
}
FOLDERS = {
    "meta-llama/Llama-3.2-1B": ErrorId.model_folder_wrong,
    "nothing": ErrorId.model_folder_wrong,
    "broken": ErrorId.model_folder_wrong,
    "list": ErrorId.model_folder_wrong,
    "deep": ErrorId.model_folder_wrong,
    "gpt": ErrorId.model_not_supported,
    "other": ErrorId.model_not_supported,
    "weightless": ErrorId.model_folder_wrong,
}


def test_bad_folders_end_with_code_2_before_torch_and_ray_and_leave_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    contents = {"broken": "{", "list": "[]", "deep": '{"a":' * 100_000, "gpt": '{"model_type": "gpt2"}'}
    for name in (*contents, "nothing"):
        (work / name).mkdir(parents=True)
    for name, text in contents.items():
        (work / name / "config.json").write_text(text)
    write(work, replace(MODELS["llama"], name="weightless"))
    write(work, replace(MODELS["qwen2"], name="other"), architectures=["Qwen2ForSequenceClassification"])
    before = sorted(path.name for path in work.rglob("*"))
    calls = [
        ([word.format(name) for word in words], verb, name, (ErrorId.checkpoint_missing if "run" in words[1] else id))
        for verb, words in VERBS.items()
        for name, id in FOLDERS.items()
        if not (verb == "plan" and name == "weightless")  # it needs none
    ]
    code = (
        "import sys, io, json, contextlib\n"
        "from headrace.platform.cli.main import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said: code = main(argv)\n"
        "    heavy = [name for name in ('torch', 'ray', 'mlflow') if name in sys.modules]\n"
        "    print(json.dumps([code, heavy, said.getvalue()]))\n"
    )
    argv = json.dumps([words for words, *_ in calls])
    done = subprocess.run(
        [sys.executable, "-c", code, argv], cwd=work, capture_output=True, text=True, check=True, timeout=600
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (_, verb, name, id), (exit_code, heavy, said) in zip(calls, answers, strict=True):
        assert (exit_code, heavy) == (2, []), (verb, name, said)
        assert said.rstrip().endswith(f"[{id}]"), (verb, name, said)
        assert name in said
    assert sorted(path.name for path in work.rglob("*")) == before


def test_train_looks_at_the_weights_first(folder: Path) -> None:
    from headrace.platform.config.rules import check_trainable

    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_wrong)):
        check_trainable(load(f"model.init_from={folder}").config)
    assert load(f"model.init_from={folder}").config.model.init_from is not None
    with pytest.raises(InputError, check=has_id(ErrorId.model_folder_wrong)):
        load("experiment=finetune")


def test_an_adapter_folder_gives_the_adapter_and_what_contradicts_it_is_refused(tmp_path: Path) -> None:
    given = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=9.0, dropout=0.25, targets="q_proj,v_proj")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(peft_config(given, None)))
    word = f"adapter.init_from={tmp_path}"
    config = load(word).config
    assert config.adapter == replace(given, init_from=str(tmp_path))
    assert load(word, "adapter.dropout=0").config.adapter.dropout == 0
    for wrong in ("rank=8", "alpha=1", "targets=all"):
        with pytest.raises(InputError, match=rf"adapter\.{wrong}.*leave adapter\.{wrong.split('=')[0]} out"):
            load(word, f"adapter.{wrong}")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
        check_trainable(config)
    with pytest.raises(InputError, match="empty; name a folder"):
        load("adapter.init_from=")
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load(word)
