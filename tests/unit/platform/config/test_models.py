"""The published shapes: parameters against the totals of their releases, and against transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from headrace.platform.config.load import load_run_config
from headrace.platform.config.words import group_choices
from headrace.workers.model.adapter import num_params
from headrace.workers.model.config import Family, ModelConfig

# Totals of the published safetensors (tied embeddings once).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "mistral_7b": 7_241_732_096,
}
OURS = {"tiny", "llama_5m"}


@cache
def model(name: str) -> ModelConfig:
    return load_run_config([f"model={name}"], environ={}).config.model


def test_every_model_is_checked() -> None:
    assert set(group_choices()["model"]) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    shape = model(name)
    assert num_params(shape) == PUBLISHED[name]
    assert shape.name == name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_shape_is_a_legal_transformers_config_of_the_same_size(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = replace(model(name), num_layers=2)
    config = transformers.AutoConfig.for_model(
        shape.family.value,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in reference.parameters()) == num_params(shape)


@pytest.mark.parametrize(
    ("name", "family", "bias", "qk_norm", "tied", "window"),
    [
        ("llama3_8b", Family.llama, False, False, False, None),
        ("llama3_2_1b", Family.llama, False, False, True, None),
        ("qwen2_5_0_5b", Family.qwen2, True, False, True, None),
        ("qwen2_5_7b", Family.qwen2, True, False, False, None),
        ("qwen3_0_6b", Family.qwen3, False, True, True, None),
        ("qwen3_8b", Family.qwen3, False, True, False, None),
        ("mistral_7b", Family.mistral, False, False, False, 4096),
    ],
)
def test_family_traits(name: str, family: Family, bias: bool, qk_norm: bool, tied: bool, window: int | None) -> None:
    shape = model(name)
    traits = (shape.family, shape.qkv_bias, shape.qk_norm, shape.tie_embeddings, shape.sliding_window)
    assert traits == (family, bias, qk_norm, tied, window)


def test_rope_scaling_is_that_of_the_release() -> None:
    assert model("llama2_7b").rope_scaling is None
    for name, factor in {"llama3_8b": 8.0, "llama3_70b": 8.0, "llama3_405b": 8.0, "llama3_2_1b": 32.0}.items():
        scaling = model(name).rope_scaling
        assert scaling is not None
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (factor, 1.0, 4.0)
        assert scaling.original_max_position == 8192
    assert {model(name).rope_theta for name in ("llama3_8b", "llama3_2_1b")} == {500_000.0}
    assert {model(name).rope_theta for name in ("qwen2_5_7b", "qwen3_8b")} == {1_000_000.0}


def test_the_default_model_has_about_five_million_parameters() -> None:
    shape = replace(model("llama_5m"), vocab_size=load_run_config([], environ={}).config.data.bpe_vocab_size)
    assert num_params(shape) == pytest.approx(5e6, rel=0.1)
