"""Every experiment composes, and its whole configuration is on record: a change of a default shows up as a diff.

`pytest tests/unit/platform/config/test_golden.py --update-golden` rewrites the records.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.platform.config.load import load_run_config
from headrace.platform.config.schema import RunConfig, flat_items
from headrace.platform.config.words import OVERLAYS, group_choices
from headrace.platform.paths import CONF_DIR

GOLDEN = Path(__file__).resolve().parents[3] / "golden"
NAMES = [(group, name) for group in OVERLAYS for name in group_choices()[group]]

# What an experiment leaves to its user.
TO_BE_NAMED = {
    "finetune": ("model.init_from=null",),
    "finetune_chat_32k_1xh200": ("model.init_from=null", "data.source=chats.jsonl"),
}


@cache
def composed(group: str, name: str) -> RunConfig:
    return load_run_config([f"{group}={name}", *TO_BE_NAMED.get(name, ())], environ={}).config


@pytest.mark.parametrize(("group", "name"), NAMES, ids=["/".join(pair) for pair in NAMES])
def test_configuration_is_the_recorded_one(group: str, name: str, request: pytest.FixtureRequest) -> None:
    text = "".join(sorted(f"{key}: {json.dumps(value)}\n" for key, value in flat_items(composed(group, name))))
    path = GOLDEN / f"{group}-{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.exists(), "no record yet: run with --update-golden and commit it"
    assert text == path.read_text(), "the configuration changed: run with --update-golden and read the diff"


def test_no_record_without_an_experiment() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {"-".join(pair) for pair in NAMES}


@pytest.mark.parametrize(("group", "name"), NAMES, ids=["/".join(pair) for pair in NAMES])
def test_every_key_of_an_overlay_takes_effect(group: str, name: str) -> None:
    written = yaml.safe_load((CONF_DIR / group / f"{name}.yaml").read_text())
    choices = written.pop("defaults", [])
    values = dict(flat_items(composed(group, name)))
    for key, value in leaves(written):
        assert values[key] == value or value == "", key
    for choice in choices:
        ((override, chosen),) = choice.items()
        chosen_group = override.removeprefix("override /")
        if chosen_group in ("model", "hardware"):
            assert values[f"{chosen_group}.name"] == chosen


@pytest.mark.parametrize("name", group_choices()["experiment"])
def test_a_run_is_named_after_its_experiment(name: str) -> None:
    assert composed("experiment", name).run.name == name


def leaves(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in node.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found
