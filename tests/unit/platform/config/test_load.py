"""Composition: defaults, order of precedence, the text that is written down, and what is imported on the way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from headrace.platform.config.load import config_text, load_run_config, load_saved_config
from headrace.platform.config.schema import RunConfig, key_types
from headrace.platform.config.words import OVERLAYS, group_choices
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset

GROUPS = group_choices()


def load(*words: str) -> RunConfig:
    return load_run_config(words, environ={}).config


def test_plain_dataclasses_come_out() -> None:
    config = load()
    assert type(config) is RunConfig
    for key, key_type in key_types().items():
        node = config
        for part in key.split("."):
            node = getattr(node, part, None)
        if is_dataclass(key_type.kind) and node is not None:
            assert type(node) is key_type.kind, key


def test_a_bare_command_takes_the_default_experiment_and_a_chosen_model_does_not() -> None:
    assert load_run_config([], environ={}).choices == {"experiment": "default"}
    assert load().tiers.device.budget_gib is not None
    for word in ("model=tiny", "hardware=h200", "experiment=null", "experiment="):
        assert load(word).tiers.device.budget_gib is None, word
    assert load("cluster.num_workers=2").tiers.device.budget_gib is not None


def test_overlays_and_words_outrank_group_choices_in_this_order() -> None:
    assert load("experiment=qwen2_5_7b_16k_1xh200").train.steps == 20
    assert load("experiment=qwen2_5_7b_16k_1xh200", "debug=three_steps").train.steps == 3
    assert load("train.steps=5", "experiment=qwen2_5_7b_16k_1xh200", "debug=three_steps").train.steps == 5
    assert load("experiment=qwen2_5_7b_16k_1xh200", "model=tiny").model.name == "tiny"


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in GROUPS.items() for n in names if g not in OVERLAYS])
def test_every_choice_of_every_group_composes(group: str, name: str) -> None:
    words = ["data.source=x", "data.prepared=x"] if group == "data" else []
    chosen = getattr(load(f"{group}={name}", *words), group)
    if group in ("data", "hardware", "model"):
        assert chosen.name == name
    if group == "memory":
        assert chosen.preset.value == name


def test_every_group_is_a_field_and_every_preset_is_a_choice() -> None:
    branches = {key for key, key_type in key_types().items() if "." not in key and key_type.is_branch}
    assert set(GROUPS) - set(OVERLAYS) == branches - {"run"}
    assert set(GROUPS["memory"]) == {preset.value for preset in MemoryPreset}


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "source_tree"])
def test_a_source_that_was_not_named_is_asked_for(name: str) -> None:
    with pytest.raises(InputError, match=r"data\.source"):
        load(f"data={name}")


def test_the_written_text_loads_to_the_same_configuration(tmp_path: Path) -> None:
    loaded = load_run_config(["model=llama3_8b", "run.name=a, {b} $c", "tracking.tags.x=1", "memory=keep"], environ={})
    for text in (loaded.text, config_text(loaded.config)):
        (tmp_path / "config.yaml").write_text(text)
        again = load_saved_config(tmp_path / "config.yaml", environ={})
        assert again.config == loaded.config


def test_a_saved_configuration_takes_keys_and_memory_but_no_other_choice(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(load_run_config([], environ={}).text)
    changed = load_saved_config(path, ["train.steps=77", "memory=keep"], environ={}).config
    assert (changed.train.steps, changed.memory.preset) == (77, MemoryPreset.keep)
    assert load_saved_config(path, environ={"HEADRACE_OVERRIDES": "train.steps=5"}).config.train.steps == 5
    with pytest.raises(InputError, match="single keys"):
        load_saved_config(path, ["model=tiny"], environ={})


def test_a_damaged_saved_configuration_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("run: [", "run: {name: x}\nmodle: {}\n", "train: {steps: many}\n", "[1]\n", "words\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml"):
            load_saved_config(path, environ={})
    with pytest.raises(InputError, match="run folder"):
        load_saved_config(tmp_path / "none.yaml", environ={})


def test_a_broken_file_of_conf_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from headrace.platform.config import load as load_module
    from headrace.platform.config import words as words_module
    from headrace.platform.paths import CONF_DIR

    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    for module in (load_module, words_module):
        monkeypatch.setattr(module, "CONF_DIR", conf)
    (conf / "optim" / "mine.yaml").write_text("lrr: 1.0\n")
    (conf / "optim" / "torn.yaml").write_text("lr: [1.0\n")
    (conf / "optim" / "typed.yaml").write_text("lr: fast\n")
    for name, said in {
        "mine": r"conf/optim/mine\.yaml: optim\.lrr: no such key; did you mean `optim\.lr`",
        "torn": r"torn\.yaml.*line 1",
        "typed": r"conf/optim/typed\.yaml: optim\.lr takes a number",
    }.items():
        with pytest.raises(InputError, match=said):
            load(f"optim={name}")


BAD_WORDS = ["modle=tiny", "train.steps=abc", "+a=1", "parallel.tensor=3", "chunk_size=4096", "cluster.num_workers=0"]


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_bad_input_ends_with_code_2_in_two_seconds_without_torch_or_ray(verb: str, tmp_path: Path) -> None:
    """Seconds of this process; the first word pays for what is imported."""
    code = (
        "import sys, time\n"
        "from headrace.platform.cli.main import main\n"
        "begin_s = 0.0\n"
        "for word in sys.argv[2:]:\n"
        "    code = main([sys.argv[1], word])\n"
        "    end_s = time.process_time()\n"
        "    heavy = [m for m in ('torch', 'ray', 'mlflow') if m in sys.modules]\n"
        "    print('ended', code, end_s - begin_s < 2.0, heavy)\n"
        "    print('ended', file=sys.stderr, flush=True)\n"
        "    begin_s = end_s\n"
    )
    words = [sys.executable, "-c", code, verb, *BAD_WORDS]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    ends = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends == ["ended 2 True []"] * len(BAD_WORDS), done.stdout + done.stderr
    for word, said in zip(BAD_WORDS, done.stderr.split("ended\n"), strict=False):
        assert word.partition("=")[0].lstrip("+") in said
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_what_the_words_changed_is_told_against_their_choices(tmp_path: Path) -> None:
    loaded = load_run_config(["debug=three_steps", "optim.lr=0.5", "run.name=mine", "memory.preset=auto"], environ={})
    plain = load_run_config(["debug=three_steps"], environ={})
    assert plain.changed == {}
    assert loaded.changed == {
        "optim.lr": (plain.config.optim.lr, 0.5),
        "run.name": (plain.config.run.name, "mine"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(loaded.text)
    assert load_saved_config(path, ["optim.lr=0.5", "train.steps=9"], environ={}).changed == {"train.steps": (3, 9)}
