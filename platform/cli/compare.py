"""`headrace compare`: several runs side by side, as a table and as one page."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from headrace.platform.keys import split_flags
from headrace.storage.core.errors import ErrorId, InputError, MachineError
from headrace.storage.core.json_lines import legal_json

USAGE = """\
usage: headrace compare RUN RUN ... [out=FILE.html] [--json]

Puts runs side by side: what differs in configuration, plan, code and machine; loss curves, throughput, MFU, memory of
each tier, predicted and measured values. Prints a table and writes one page. A RUN is a folder, a name below runs/, or
`last`. Also for runs that go on or were killed.

  out=FILE.html   the page; default: comparison.html in the folder that holds the first run
"""
PAGE = "comparison.html"
RUNS_VARIABLE = "HEADRACE_RUNS"


def run(argv: Sequence[str]) -> int:
    """Run `headrace compare ...`.

    Raises:
        InputError: fewer than two runs, no such run, a file that is not a run's. MachineError: the page cannot be
            written.
    """
    from headrace.platform.report.comparison import read_runs, text_table, to_json, write_comparison
    from headrace.platform.tracking.run_folder import find_run
    from headrace.platform.tracking.settle import settle_if_lost

    flags, words = split_flags([*_typed_runs(), *argv], ("--json",))
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    names = [word for word in words if not word.startswith("out=")]
    if len(outs) > 1 or "" in outs:
        raise InputError(f"out={outs[-1]}: give one file, such as out={PAGE}")
    if len(names) < 2:
        raise InputError(f"compare: at least two runs are expected, got {len(names)}; `headrace report RUN` shows one")
    run_dirs = [find_run(name.removeprefix("run=")) for name in names]
    folders = [path.resolve() for path in run_dirs]
    for name, path in zip(names, folders, strict=True):
        if folders.count(path) > 1:
            raise InputError(f"compare: the run {name} is given twice; give it once")
    for run_dir in run_dirs:
        settle_if_lost(run_dir)
    page = Path(outs[0]) if outs else run_dirs[0].parent / PAGE
    try:
        runs = read_runs(run_dirs)
        text, record = text_table(runs), to_json(runs)
        write_comparison(runs, page)
    except OSError as error:
        raise MachineError(
            f"out={page}: the page cannot be written ({error.strerror or error}); name another file"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"compare: a file of {', '.join(names)} is not that of a run ({type(error).__name__}: {error}); "
            "`headrace report RUN` tells which",
            id=ErrorId.data_wrong,
        ) from error
    if "--json" in flags:
        print(json.dumps({"page": str(page), **legal_json(record)}))
    else:
        print(f"{text}\n\n{page}")
    return 0


def _typed_runs() -> list[str]:
    """The runs that `make compare runs="..."` passes.

    Raises:
        InputError: an unclosed quote.
    """
    text = os.environ.get(RUNS_VARIABLE, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"runs={text!r}: {error}; close the quote") from None
