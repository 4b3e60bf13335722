"""`headrace sweep`: a grid of runs, one table at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from headrace.platform.config.load import load_run_config
from headrace.platform.config.rules import check_trainable
from headrace.platform.config.schema import RunConfig
from headrace.platform.config.words import environment_words
from headrace.platform.control.config import Launcher
from headrace.platform.control.sweep import RunEnd, Sweep, SweepRun, SweepRunner, open_sweep, read_grid
from headrace.platform.keys import read_keys, split_flags
from headrace.platform.tracking.run_folder import read_json, write_json
from headrace.storage.core.errors import HeadraceError, InputError
from headrace.storage.core.json_lines import legal_json

USAGE = """\
usage: headrace sweep KEY=A,B,C [KEY=D,E ...] [dir=FOLDER] [jobs=N] [conf=EXPERIMENT] [key=value ...] [-- key=value ...]

One run of `headrace train` for every combination of the values, and a table and a page that compare them at the end:
  headrace sweep memory=keep,recompute,offload_host data.seq_len=4096,8192 train.steps=20

  dir=FOLDER   holds the run folders, sweep.json and comparison.html; default: runs/sweep-TIME
  jobs=N       runs at once; default 1. They share one Ray, which gives each its GPUs, so N times the ranks of a run
               must fit. Memory budgets are those of each run: share the machine's memory out with tiers.host.budget_gib
  --           words behind it are taken as they are: a comma in them separates nothing

The same words and dir= again do what is left: finished runs stay, the others go on from their newest checkpoint. A run
that does not fit or fails is named below the table, and the others run. In MLflow the runs stand below one parent run.
Exit codes: 0 all runs finished, 1 one failed or was refused, 2 bad input, 3 stopped by a signal after checkpoints.
"""
RUNS_DIR = Path("runs")
OWN_KEYS: Mapping[str, Any] = {"dir": str, "jobs": int}
PARENT_FILE = "mlflow_parent.json"
PAGE = "comparison.html"


def run(argv: Sequence[str]) -> int:
    """Run `headrace sweep ...`.

    Args:
        argv: words after `sweep`; those of HEADRACE_CONF and HEADRACE_OVERRIDES come before them.

    Returns:
        0 all runs finished, 1 one failed or was refused, 3 stopped by a signal.

    Raises:
        InputError: a bad word in any of the runs, a folder of another sweep.
    """
    flags, words = split_flags([word for word in argv if word != "--"], ("--json",))
    words = [*environment_words(os.environ), *(word for word in argv if word not in flags)]
    own = [word for word in words if word.partition("=")[0] in OWN_KEYS]
    values = read_keys(own, OWN_KEYS)
    jobs = values.get("jobs", 1)
    if jobs < 1:
        raise InputError(f"jobs={jobs}: at least one run at a time is expected")
    grid = read_grid([word for word in words if word not in own])
    configs = [_checked(run) for run in grid.runs]
    folder = Path(values.get("dir") or RUNS_DIR / f"sweep-{datetime.now().strftime('%Y%m%d-%H%M%S')}")
    sweep = open_sweep(folder.absolute(), grid)
    with _parent(sweep, configs[0]) as parent, _shared_ray(configs, jobs) as environ:
        further = [] if parent is None else parent.words
        ends = SweepRunner(sweep, jobs=jobs, words=further, environ=environ, say=_say).run()
        record = _compare(sweep, ends)
        if parent is not None:
            parent.ends = ends
    if "--json" in flags:
        print(json.dumps(legal_json(record)))
    return _exit_code(ends)


def _say(line: str) -> None:
    print(line, flush=True)


def _checked(run: SweepRun) -> RunConfig:
    """The configuration of a run, checked as `headrace train` does before it starts anything."""
    try:
        config = load_run_config(run.words, environ={}).config
        check_trainable(config)
    except InputError as error:
        raise InputError(f"{run.name}: {error}", id=error.id) from error
    if config.run.dir is not None:
        raise InputError(f"run.dir={config.run.dir}: a sweep names the folders of its runs; give dir=FOLDER")
    return config


@dataclass
class _Parent:
    """The parent run in MLflow: words that put a run below it, and how the runs ended."""

    words: list[str]
    ends: Mapping[str, RunEnd]


@contextmanager
def _parent(sweep: Sweep, config: RunConfig) -> Iterator[_Parent | None]:
    """The MLflow run of the sweep, for as long as the block runs. Without MLflow the sweep runs and says so."""
    if not config.tracking.mlflow:
        yield None
        return
    from headrace.platform.tracking.parent_run import ParentRun

    path = sweep.folder / PARENT_FILE
    params = {key: ",".join(values) for key, values in sweep.grid.axes.items()}
    try:
        run = ParentRun(sweep.folder, config.tracking, params, read_json(path).get("run_id"))
    except HeadraceError as error:
        print(f"headrace sweep: warning: {error}; the runs have no parent run there", file=sys.stderr)
        yield None
        return
    write_json(path, {"run_id": run.run_id, "tracking_uri": run.tracking_uri})
    parent = _Parent([f"tracking.parent_run_id={run.run_id}", f"tracking.tracking_uri={run.tracking_uri}"], {})
    status = "FAILED"
    try:
        yield parent
        status = "FINISHED" if set(parent.ends.values()) == {RunEnd.finished} else "FAILED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            run.close(status, [sweep.folder / PAGE])
        except HeadraceError as error:
            print(f"headrace sweep: warning: {error}", file=sys.stderr)


@contextmanager
def _shared_ray(configs: Sequence[RunConfig], jobs: int) -> Iterator[Mapping[str, str]]:
    """The environment of the runs. Runs at once need one Ray: two of them would give out the same GPUs."""
    cluster = configs[0].cluster
    if jobs == 1 or cluster.launcher is not Launcher.ray or cluster.address is not None or "RAY_ADDRESS" in os.environ:
        yield os.environ
        return
    from headrace.platform.control.head import find_head, start_head, stop_head

    there = find_head()
    head = there or start_head()
    print(f"Ray for {jobs} runs at once: dashboard {head.dashboard_url}", flush=True)
    try:
        yield {**os.environ, "RAY_ADDRESS": head.address}
    finally:
        if there is None:
            stop_head()


def _compare(sweep: Sweep, ends: Mapping[str, RunEnd]) -> dict[str, Any]:
    """Print the table, write the page, and return both for programs."""
    from headrace.platform.report.comparison import read_runs, text_table, to_json, write_comparison

    begun = [run for run in sweep.runs if (sweep.run_dir(run) / "metrics.jsonl").exists()]
    record: dict[str, Any] = {
        "dir": str(sweep.folder),
        "ends": {name: end.value for name, end in ends.items()},
        "page": None,
    }
    if begun:
        runs = read_runs([sweep.run_dir(run) for run in begun])
        page = sweep.folder / PAGE
        write_comparison(runs, page)
        record |= {"page": str(page), **to_json(runs)}
        print(f"\n{text_table(runs)}\n\n{page}")
    for name, end in ends.items():
        if end is not RunEnd.finished:
            print(f"{name}: {end.value}; see {sweep.folder / name}.log")
    return record


def _exit_code(ends: Mapping[str, RunEnd]) -> int:
    found = set(ends.values())
    if found & {RunEnd.stopped, RunEnd.waiting}:
        return 3
    return 0 if found == {RunEnd.finished} else 1
