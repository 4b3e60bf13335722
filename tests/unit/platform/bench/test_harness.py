from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from headrace.bench import harness
from headrace.bench.harness import Row, Target, load_bench, parse_options, run_bench
from headrace.storage.core.errors import InputError

DEFAULTS = {"steps": 3, "lr": 0.5, "name": "x", "fast": False}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A registered benchmark that yields `steps` rows and then fails if `fast`."""

    def run(options: Mapping[str, object]) -> Iterator[Row]:
        for i in range(int(str(options["steps"]))):
            yield Row(f"r{i}", {"s": float("nan") if i else 1.5}, {"i": i}, Target("at most 1 s", met=i > 0))
        if options["fast"]:
            raise RuntimeError("out of luck")

    module = ModuleType("toy_bench")
    module.DESCRIPTION, module.OPTIONS, module.run = "a toy", DEFAULTS, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_bench", module)
    monkeypatch.setitem(harness.BENCHES, "toy-bench", "toy_bench")
    return module


def test_rows_are_on_disk_with_their_origin(toy: ModuleType, tmp_path: Path) -> None:
    seen: list[str] = []
    path, rows = run_bench("toy_bench", DEFAULTS, tmp_path, on_row=lambda row: seen.append(row.name))
    assert path.parent == tmp_path / "toy-bench"
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert set(content) >= {"bench", "started", "commit", "dirty", "versions", "machine", "options", "complete", "rows"}
    assert content["complete"] is True
    assert seen == [row.name for row in rows] == ["r0", "r1", "r2"]
    assert content["rows"][0]["target"] == {"text": "at most 1 s", "met": False}
    assert content["rows"][1]["numbers"] == {"s": None}
    assert content["options"] == DEFAULTS


def test_a_second_measurement_is_a_second_file(toy: ModuleType, tmp_path: Path) -> None:
    first, _ = run_bench("toy-bench", DEFAULTS, tmp_path)
    before = first.read_bytes()
    second, _ = run_bench("toy-bench", {**DEFAULTS, "steps": 1}, tmp_path)
    assert second != first
    assert first.read_bytes() == before


def test_a_benchmark_that_fails_keeps_what_it_measured(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="luck"):
        run_bench("toy-bench", {**DEFAULTS, "fast": True}, tmp_path)
    (path,) = (tmp_path / "toy-bench").iterdir()
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert len(content["rows"]) == 3


def test_nothing_measured_leaves_no_file(toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measured nothing"):
        run_bench("toy-bench", {**DEFAULTS, "steps": 0}, tmp_path)
    assert list((tmp_path / "toy-bench").iterdir()) == []


def test_options_have_the_type_of_their_default() -> None:
    found = parse_options(["steps=7", "lr=1e-3", "name=a=b", "fast=True"], DEFAULTS)
    assert found == {"steps": 7, "lr": 1e-3, "name": "a=b", "fast": True}
    assert parse_options([], DEFAULTS) == DEFAULTS


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("step=1", "did you mean `steps`"),
        ("steps", "not KEY=VALUE"),
        ("steps=1.5", "whole number"),
        ("lr=x", "a number"),
        ("fast=yes", "true or false"),
    ],
)
def test_bad_options_are_explained(word: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_options([word], DEFAULTS)
    with pytest.raises(InputError, match="twice"):
        parse_options(["steps=1", "steps=1"], DEFAULTS)


def test_unknown_names_are_explained_and_known_ones_keep_the_contract() -> None:
    with pytest.raises(InputError, match="did you mean `ray-overhead`"):
        load_bench("ray-overhed")
    for name in harness.BENCHES:
        bench = load_bench(name)
        assert isinstance(bench.DESCRIPTION, str)
        assert all(isinstance(value, int | float | str | bool) for value in bench.OPTIONS.values())
        assert callable(bench.run)
