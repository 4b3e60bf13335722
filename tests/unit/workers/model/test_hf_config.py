"""config.json in and out, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from headrace.helpers.tiers import has_id
from headrace.helpers.tiny_models import LLAMA
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.model.config import Family, ModelConfig, RopeScaling
from headrace.workers.model.hf_config import config_to_hf, load_config

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(key=value, ...): a folder with BASE and these keys; a value of ... leaves the key out."""

    def make(**keys: Any) -> Path:
        values = {key: value for key, value in {**BASE, **keys}.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return make


def test_both_spellings_of_the_rotary_keys_mean_the_same(write: Callable[..., Path]) -> None:
    old = load_config(write(rope_theta=5e5, rope_scaling={"type": "llama3", **SCALED}))
    new = load_config(write(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALED}))
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling(factor=4.0, original_max_position=64))
    assert load_config(write()).rope_theta == 10000.0
    assert load_config(write(rope_theta=7.0, rope_scaling=None)).rope_theta == 7.0


@pytest.mark.parametrize("kind", [family.value for family in Family])
def test_missing_keys_mean_what_they_mean_in_transformers(write: Callable[..., Path], kind: str) -> None:
    folder = write(model_type=kind, num_attention_heads=32, hidden_size=4096)
    ours, theirs = load_config(folder), transformers.AutoConfig.from_pretrained(folder)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_size == head_dim
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == (getattr(theirs, "sliding_window", None))
    assert ours.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2", "qwen3"]),
        ({"model_type": ...}, ["model_type", "llama"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["rope_type", "longrope", "yarn", "llama3"]),
        ({"model_type": "mistral", "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}, ["layer_types"]),
        ({"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ({"rms_norm_eps": float("inf")}, ["rms_norm_eps"]),
        ({"pad_token_id": 32}, ["pad_token_id", "vocab_size=32"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "num_attention_heads=4"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "all layers"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor", "missing"]),
        ({"rope_scaling": {"rope_type": "llama3", **SCALED, "high_freq_factor": 1.0}}, ["high_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"attention_bias": True}, ["attention_bias", "true"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bf16"]),
        ({"vocab_size": ...}, ["vocab_size", "missing"]),
        ({"vocab_size": "32"}, ["vocab_size", '"32"', "whole number"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"rms_norm_eps": True}, ["rms_norm_eps"]),
        (
            {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            ["max_window_layers", "all or none"],
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    write: Callable[..., Path], keys: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(**keys))
    for word in (*words, "config.json"):
        assert word in str(caught.value)


def test_no_file_or_no_json(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", "Qwen/Qwen2.5-7B"):
        with pytest.raises(InputError, check=has_id(ErrorId.model_folder_wrong)):
            load_config(folder)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"config\.json: is not"):
            load_config(tmp_path)


def make(**changes: Any) -> ModelConfig:
    base = replace(LLAMA, vocab_size=32, num_layers=2, head_dim=8)
    return replace(base, **changes)


@pytest.mark.parametrize(
    "config",
    [
        make(),
        make(rope_scaling=RopeScaling(factor=4.0, original_max_position=64), rope_theta=5e5, tie_embeddings=True),
        make(family=Family.qwen2, qkv_bias=True, max_position_embeddings=77),
        make(family=Family.qwen3, qk_norm=True, sliding_window=5, rms_norm_eps=1e-6),
        make(family=Family.mistral, sliding_window=7),
        make(family=Family.mistral),
    ],
)
def test_what_is_written_is_read_back_the_same(tmp_path: Path, config: ModelConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load_config(tmp_path)
    for field in fields(ModelConfig):
        if field.name != "name":
            assert getattr(read, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (make(qkv_bias=True), "qkv_bias=True"),
        (make(family=Family.qwen3), "qk_norm=False"),
        (make(sliding_window=4), "sliding_window=4"),
    ],
)
def test_what_transformers_cannot_say_is_not_written(config: ModelConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config_to_hf(config, "float32")
