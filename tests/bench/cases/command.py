"""`headrace bench`: run a named benchmark and record its rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.platform.keys import split_flags
from headrace.storage.core.outside import parse_json, read_regular

USAGE = """\
usage: headrace bench NAME [KEY=VALUE ...] [out=DIR] [--json]
       headrace bench --list

Writes the rows to a new JSON file in bench_results/NAME (or in out=DIR/NAME), with commit, versions, machine, options
and numbers. No file is overwritten. To keep rows in the repository, use out=tests/bench/results in a checkout. The
command does not fail if a target is not met.
"""


def run(argv: Sequence[str]) -> int:
    """Run `headrace bench ...`.

    Args:
        argv: words after `bench`.

    Returns:
        0; 1 when a row has an error; 2 when no name is given.

    Raises:
        InputError: no such benchmark, key or value.
    """
    from headrace.bench.harness import Row, bench_names, load_bench, parse_options, run_bench
    from headrace.platform.paths import RESULTS_DIR

    flags, words = split_flags(argv, ("--list", "--json"))
    if "--list" in flags:
        found = bench_names()
        text = [f"{name:<16} {description}" for name, description in found.items()]
        print(json.dumps(found) if "--json" in flags else "\n".join(text))
        return 0
    if not words:
        print(USAGE, end="")
        return 2
    name, rest = words[0], words[1:]
    bench = load_bench(name)
    folders = [word.partition("=")[2] for word in rest if word.startswith("out=")]
    options = parse_options([word for word in rest if not word.startswith("out=")], bench.OPTIONS)

    def show(row: Row) -> None:
        print(describe(row), file=sys.stderr if "--json" in flags else sys.stdout, flush=True)

    results_dir = Path(folders[-1]).expanduser() if folders else RESULTS_DIR
    path, rows = run_bench(name, options, results_dir, on_row=show)
    if "--json" in flags:
        print(json.dumps({"file": str(path), **parse_json(read_regular(path))}))
    else:
        print(f"{len(rows)} row(s) in {path}")
    return 1 if any(row.error for row in rows) else 0


def describe(row: object) -> str:
    """One row as a line of text."""
    from headrace.bench.harness import Row

    assert isinstance(row, Row)
    if row.error is not None:
        return f"{row.name}: {row.error}"
    numbers = "  ".join(f"{key}={value:.6g}" for key, value in row.numbers.items() if value is not None)
    target = "" if row.target is None else f"  [{'met' if row.target.met else 'NOT MET'}: {row.target.text}]"
    return f"{row.name}: {numbers}{target}"
