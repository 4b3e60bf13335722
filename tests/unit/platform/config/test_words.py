"""Words of the command line and of make: what is refused, what it says, and that values arrive as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.platform.config.load import LoadedConfig, config_text, load_run_config, load_saved_config
from headrace.platform.config.words import environment_words, group_choices, parse_words
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset


def load(*words: str, conf: str = "", overrides: str = "") -> LoadedConfig:
    return load_run_config(words, environ={"HEADRACE_CONF": conf, "HEADRACE_OVERRIDES": overrides})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("modle=tiny", "did you mean `model`?"),
        ("model=tinny", "did you mean `tiny`?"),
        ("model.hiden_size=4", "did you mean `model.hidden_size`?"),
        ("seq_len=5", "did you mean `data.seq_len`?"),
        ("steps=5", "did you mean `train.steps`?"),
        ("memory=offload_hots", "did you mean `offload_host`?"),
        ("hardware=h20", "did you mean `h200`?"),
        ("experiment=defualt", "did you mean `default`?"),
        ("train.precision=bf15", "did you mean `bf16`?"),
        ("model.rope_scaling={facto: 8}", "did you mean `factor`?"),
        ("tiers.ssd.budget_gb=3", "did you mean `tiers.ssd.budget_gib`?"),
    ],
)
def test_misspelt_names_are_answered_with_the_right_one(word: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load(word)
    assert said in str(caught.value)
    assert word.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "word", ["+model.foo=1", "++train.steps=3", "+experiment=default", "~memory", "+train.steps=3"]
)
def test_adding_and_removing_keys_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="cannot be added or removed"):
        load(word)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.steps=abc", "a whole number"),
        ("train.steps=50.0", "a whole number"),
        ("train.steps=", "a value is missing; expected a whole number"),
        ("train.steps=null", "a whole number"),
        ("optim.lr=fast", "a number"),
        ("train.deterministic=maybe", "true or false"),
        ("train.precision=fp8", "one of fp32, bf16"),
        ("tiers.host=3", "a mapping with the keys budget_gib"),
        ("train.grad_clip=x", "a number, or null"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_was_expected(word: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load(word)
    assert str(caught.value).startswith(word)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("word", "said"), [("train.steps", "not KEY=VALUE"), ("--foo", "unknown flag"), ("=3", "no such key")]
)
def test_words_that_are_no_settings(word: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(word)


def test_values_are_converted_by_the_type_of_their_key() -> None:
    config = load(
        "train.steps=1_000",
        "optim.lr=1e-3",
        "train.deterministic=off",
        "train.grad_clip=null",
        "model.rope_scaling.factor=7",
    ).config
    assert (config.train.steps, config.optim.lr, config.train.deterministic) == (1000, 1e-3, False)
    assert config.train.grad_clip is None
    assert config.model.rope_scaling is not None
    assert (config.model.rope_scaling.factor, config.model.rope_scaling.high_freq_factor) == (7.0, 4.0)


@pytest.mark.parametrize(
    "text",
    [
        "a, b",
        "{x: 1}",
        "$HOME",
        "a=b",
        "[1,2]",
        "it's",
        'say "hi"',
        "tail\\",
        "a|b;c&d",
        "null words",
        "50%",
        "#1",
        "a: b",
    ],
)
def test_text_arrives_as_it_was_written(text: str) -> None:
    loaded = load(f"run.name={text}", f"tracking.tags.note={text}", f"data.source={text}")
    assert loaded.config.run.name == text
    assert loaded.config.tracking.tags == {"note": text}
    assert loaded.config.data.source == text


def test_text_of_make_overrides_survives_the_shell_split() -> None:
    config = load(overrides="train.steps=7 run.name='two words, {braces} $cash' memory=keep").config
    assert (config.train.steps, config.run.name, config.memory.preset) == (
        7,
        "two words, {braces} $cash",
        MemoryPreset.keep,
    )


@pytest.mark.parametrize(
    "text", ["${nope}", "${oc.env:HOME}", "a ${", "$", "$$x", "\\${x}", "???", "? x", "${data.seq_len}", "??? ${x}"]
)
def test_nothing_typed_is_interpolated_now_or_when_the_saved_configuration_is_read(text: str, tmp_path: Path) -> None:
    loaded = load(f"run.name={text}", f"tracking.tags.note={text}", f"tracking.tags={{more: '{text}'}}")
    for written in (loaded.text, config_text(loaded.config)):
        path = tmp_path / "config.yaml"
        path.write_text(written, encoding="utf-8")
        for config in (loaded.config, load_saved_config(path, environ={}).config):
            assert config.run.name == text
            assert config.tracking.tags == {"note": text, "more": text}


def test_the_command_line_wins_over_the_environment() -> None:
    config = load(
        "train.steps=9", conf="experiment/qwen2_5_7b_256k_1xh200", overrides="train.steps=7 optim.lr=0.5"
    ).config
    assert (config.model.name, config.train.steps, config.optim.lr) == ("qwen2_5_7b", 9, 0.5)


@pytest.mark.parametrize(
    ("conf", "word"),
    [
        ("experiment/default", "experiment=default"),
        ("default", "experiment=default"),
        ("conf/experiment/default.yaml", "experiment=default"),
        ("debug/cpu_tiny", "debug=cpu_tiny"),
        ("model/tiny", "model=tiny"),
        ("", None),
    ],
)
def test_conf_names_a_file_of_conf(conf: str, word: str | None) -> None:
    assert environment_words({"HEADRACE_CONF": conf}) == ([] if word is None else [word])


def test_a_wrong_conf_prints_the_list() -> None:
    with pytest.raises(InputError) as caught:
        load(conf="experiment/qwen2_5_7b_256k_1xh20")
    assert "did you mean `experiment/qwen2_5_7b_256k_1xh200`?" in str(caught.value)
    for name in group_choices()["experiment"]:
        assert f"experiment/{name}" in str(caught.value)


def test_an_unclosed_quote_is_explained() -> None:
    with pytest.raises(InputError, match="close the quote"):
        load(overrides="run.name='abc")


def test_the_last_choice_of_a_group_counts() -> None:
    assert parse_words(["model=tiny", "model=qwen3_8b"]).choices == {"model": "qwen3_8b"}
