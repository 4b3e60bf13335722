"""A recipe of one's own, by path: what it may say, and what is said about one that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.helpers.tiers import has_id
from headrace.platform.config.load import LoadedConfig, load_run_config, load_saved_config
from headrace.platform.paths import CONF_DIR
from headrace.storage.core.errors import ErrorId, InputError

RECIPE = """\
defaults:
  - override /model: tiny
  - override /memory: keep
run:
  name: mine
train:
  steps: 7
data:
  seq_len: 64
"""


def load(*words: str, conf: str = "") -> LoadedConfig:
    return load_run_config(words, environ={"HEADRACE_CONF": conf})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "my recipe, {1}.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_read_from_the_command_line_and_from_make(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = load(f"conf={recipe}").config
    assert (config.run.name, config.model.name, config.memory.preset) == ("mine", "tiny", "keep")
    assert (config.train.steps, config.data.seq_len, config.tiers.device.budget_gib) == (7, 64, None)
    assert load(conf=str(recipe)).config == config
    assert load(f"experiment={recipe}").config == config
    monkeypatch.chdir(recipe.parent)
    assert load(f"conf={recipe.name}").config == config
    (tmp_path / "config.yaml").write_text(load(f"conf={recipe}").text)
    assert load_saved_config(tmp_path / "config.yaml", environ={}).config == config


def test_words_and_debug_outrank_a_recipe(recipe: Path) -> None:
    assert load(f"conf={recipe}", "train.steps=9", "model=llama_5m").config.train.steps == 9
    assert load("model=llama_5m", f"conf={recipe}").config.model.name == "llama_5m"
    assert load("debug=three_steps", f"conf={recipe}").config.train.steps == 3
    assert load(f"conf={recipe}", "conf=experiment/default").config.run.name == "default"


@pytest.mark.parametrize("path", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_copy_of_an_experiment_is_the_same_run(path: Path, tmp_path: Path) -> None:
    more = ["model.init_from=null", "data.source=x"] if "finetune" in path.stem else []
    copy = tmp_path / "copy.yaml"
    copy.write_text(path.read_text())
    assert load(f"conf={copy}", *more).config == load(f"conf=experiment/{path.stem}", *more).config


def test_text_in_a_recipe_is_literal(recipe: Path) -> None:
    recipe.write_text("run:\n  name: ${oc.env:HOME} ${ $x\ntrain:\n")
    assert load(f"conf={recipe}").config.run.name == "${oc.env:HOME} ${ $x"


@pytest.mark.parametrize(
    ("text", "said", "id"),
    [
        ("train: {stepz: 7}", "train.stepz", ErrorId.input_wrong),
        ("train: {steps: abc}", "train.steps takes a whole number", ErrorId.input_wrong),
        ("modle: {name: x}", "modle", ErrorId.input_wrong),
        ("hello", "hello", ErrorId.input_wrong),
        ("memory: keep", "override /memory", ErrorId.recipe_wrong),
        ("defaults: [override /modle: tiny]", "did you mean `model`?", ErrorId.recipe_wrong),
        ("defaults: [override /experiment: default]", "override /experiment", ErrorId.recipe_wrong),
        ("defaults: [override /model: tinny]", "did you mean `tiny`?", ErrorId.recipe_wrong),
        ("defaults: [tiny]", "'tiny'", ErrorId.recipe_wrong),
        ("defaults: [model: tiny]", "model", ErrorId.recipe_wrong),
        ("defaults: tiny", "defaults is a list", ErrorId.recipe_wrong),
        ("train: {steps: 3}\ntrain: {seed: 4}", "duplicate key train", ErrorId.recipe_wrong),
        ("a: [", "is not YAML", ErrorId.recipe_wrong),
        ("a: " + "[" * 20_000, "is not YAML", ErrorId.recipe_wrong),
        ('!!python/object/apply:os.system ["touch pwned"]', "is not YAML", ErrorId.recipe_wrong),
        ("- a", "not a mapping", ErrorId.recipe_wrong),
        ("", "not a mapping", ErrorId.recipe_wrong),
        (b"\xff\xfe", "is not YAML", ErrorId.recipe_wrong),
        (None, "No such file", ErrorId.recipe_wrong),
    ],
)
def test_a_bad_recipe_is_named_with_what_is_wrong(
    text: str | bytes | None, said: str, id: ErrorId, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    if text is None:
        recipe.unlink()
    else:
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    for loaded in (lambda: load(f"conf={recipe}"), lambda: load(conf=str(recipe))):
        with pytest.raises(InputError, check=has_id(id)) as caught:
            loaded()
        assert said in str(caught.value)
        assert str(recipe) in str(caught.value)
    assert not (recipe.parent / "pwned").exists()


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(InputError, check=has_id(ErrorId.recipe_wrong)):
        load(f"conf={tmp_path / 'x.yaml'}")
