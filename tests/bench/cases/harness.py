"""Runs a named benchmark and records its rows.

A benchmark is a module with three names:

    DESCRIPTION: str                       one line for `headrace bench --list`
    OPTIONS: Mapping[str, int | float | str | bool]   every key it understands, with its default
    run(options) -> Iterable[Row]          options is OPTIONS with the user's values, of the same types

and a line in BENCHES. It is imported when it is run, never before. `run` may be a generator: a row is on disk as soon
as it is yielded, so a benchmark that is killed keeps what it measured. A target that is not met is a row like any
other, with `met` false.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.platform.keys import hint, read_keys
from headrace.platform.tracking.provenance import provenance
from headrace.platform.tracking.run_folder import write_json
from headrace.storage.core.errors import InputError

BENCHES: dict[str, str] = {
    "addresses": "headrace.bench.addresses",
    "attention-operators": "headrace.bench.attention_operators",
    "chunks": "headrace.bench.chunks",
    "gpu-headline": "headrace.bench.gpu_headline",
    "kernels": "headrace.bench.kernels",
    "knapsack": "headrace.bench.knapsack",
    "length": "headrace.bench.length",
    "plan-check": "headrace.bench.plan_check",
    "ray-overhead": "headrace.bench.ray_overhead",
    "records-overhead": "headrace.bench.records_overhead",
    "simulate": "headrace.bench.simulate",
    "step": "headrace.bench.step",
    "tiers": "headrace.bench.tiers",
}
OptionValue = int | float | str | bool


@dataclass(frozen=True)
class Target:
    """What was promised of a row, in words with the figure in it, and whether the row keeps it."""

    text: str
    met: bool


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: of the case within the benchmark.
        numbers: what was measured; units are in the names. Ratios only of numbers of the same run.
        config: what was run, JSON-able.
        error: why there are no numbers (out of memory is an answer); None when it went well.
    """

    name: str
    numbers: Mapping[str, float | int | None] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    target: Target | None = None
    error: str | None = None


def bench_names() -> dict[str, str]:
    """Names and descriptions. A benchmark whose module cannot be imported here says why instead."""
    found = {}
    for name, path in BENCHES.items():
        try:
            found[name] = str(importlib.import_module(path).DESCRIPTION)
        except ImportError as error:
            found[name] = f"cannot be run here: {error}"
    return found


def load_bench(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        InputError: no benchmark of that name, or its imports are missing here.
    """
    name = name.replace("_", "-")
    path = BENCHES.get(name)
    if path is None:
        raise InputError(f"no benchmark {name!r}; {hint(name, BENCHES)}")
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise InputError(f"benchmark {name} cannot be run here: {error}") from error


def parse_options(words: Sequence[str], defaults: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """`key=value` words over the defaults, each converted to the type of its default.

    Raises:
        InputError: a word without `=`, an unknown or repeated key, a value of another type.
    """
    return {**defaults, **read_keys(words, {key: type(value) for key, value in defaults.items()})}


def run_bench(
    name: str,
    options: Mapping[str, OptionValue],
    results_dir: Path,
    *,
    on_row: Callable[[Row], None] = lambda row: None,
) -> tuple[Path, list[Row]]:
    """Run one benchmark; its rows are a new file of results_dir/NAME, whole after every row.

    Args:
        on_row: called with every row once it is on disk.

    Returns:
        The file, and the rows.

    Raises:
        InputError: no such benchmark. What the benchmark raises: the rows before it are on disk, with `complete` false.
    """
    bench = load_bench(name)
    name = name.replace("_", "-")
    begin = datetime.now(UTC)
    source = provenance()
    head = {"bench": name, "started": begin.isoformat(timespec="seconds"), **source.to_json(), "options": dict(options)}
    path = _new_file(results_dir / name, f"{begin:%Y%m%dT%H%M%SZ}-{source.commit[:9]}")
    rows: list[Row] = []
    produced: Iterable[Row] = bench.run(options)
    for row in produced:
        rows.append(row)
        _write(path, head, rows, complete=False)
        on_row(row)
    if not rows:
        path.unlink()
        raise InputError(f"benchmark {name} measured nothing with these options")
    _write(path, head, rows, complete=True)
    return path, rows


def _new_file(folder: Path, stem: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        path = folder / (f"{stem}.json" if number == 0 else f"{stem}-{number}.json")
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise InputError(f"{folder}: a thousand files called {stem}; give another out=DIR")


def _write(path: Path, head: Mapping[str, Any], rows: Sequence[Row], *, complete: bool) -> None:
    write_json(path, {**head, "complete": complete, "rows": [asdict(row) for row in rows]})
