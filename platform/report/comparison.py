"""Several runs side by side: what differs in configuration and plan, and what came of it. No torch.

The figures are those of the reports (tracking/summary.py), read from the run folders. So runs can be compared while
they go on, after they were killed, and on a machine that never trained them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from headrace.platform.report import comparison_pictures as pictures
from headrace.platform.report.figures import number, with_unit
from headrace.platform.report.page import predicted_cell, template
from headrace.platform.report.plan_tables import read_plan_tables
from headrace.platform.report.run_record import RunRecord, read_run
from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.mlflow_store import flatten
from headrace.platform.tracking.summary import series
from headrace.storage.core.errors import ErrorId, InputError
from headrace.storage.core.outside import read_regular
from headrace.workers.telemetry import names

# Keys that tell where a run is written and what it is called, not what it computes.
PLACE_KEYS = ("run.dir", "run.name", "data.prepared", "data.cache_dir")
RECORDS = "tracking."
# What one step trains on.
BATCH_KEYS = ("data.seq_len", "data.buckets", "train.batch_size", "train.micro_batches", "cluster.num_workers")
ABSENT = "–"


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Args:
        name: the folder's name, or its path where two runs have the same name.
        config: the resolved configuration, `a.b` to text.
        source: what it was computed from and on: commit, versions, hardware, digest of the data.
        plan: the tables of plan_tables; None without a plan.
    """

    name: str
    run_dir: Path
    record: RunRecord
    config: Mapping[str, str]
    source: Mapping[str, str]
    plan: Mapping[str, Any] | None

    @property
    def outcome(self) -> str:
        """How the run ended, or `running`."""
        return str(self.record.summary["outcome"])

    def figure(self, name: str) -> float | None:
        """A figure of FIGURES; None where the run did not measure it."""
        return FIGURES[name].of(self.record)


@dataclass(frozen=True)
class Figure:
    """One figure of a run: its words, its unit, and where it stands in the record."""

    what: str
    unit: str
    of: Callable[[RunRecord], float | None]


def _usual(key: str) -> Callable[[RunRecord], float | None]:
    return lambda record: record.summary["median"][key]


def _measured(name: str) -> Callable[[RunRecord], float | None]:
    def find(record: RunRecord) -> float | None:
        lines = record.summary["predicted_against_measured"]
        return next((line["measured"] for line in lines if line["name"] == name), None)

    return find


def _newest(name: str) -> Callable[[RunRecord], float | None]:
    return lambda record: values[-1] if (values := series(record.steps, name)) else None


FIGURES: Mapping[str, Figure] = {
    "steps": Figure("steps done", "", lambda record: record.summary["last_step"]),
    "tokens_seen": Figure("tokens seen", "", lambda record: record.summary["tokens_seen"]),
    "loss_first": Figure("loss of the first step", "", lambda record: record.summary["loss"]["first"]),
    "loss": Figure("loss, mean of the last 5 steps", "", lambda record: record.summary["loss"]["mean_of_last_5"]),
    "loss_eval": Figure("loss on held-out rows, last", "", _newest(names.LOSS_EVAL)),
    "tokens_per_s_per_gpu": Figure("tokens/s per GPU, median", "", _usual("tokens_per_s_per_gpu")),
    "step_s": Figure("step time, median", "s", _usual("step_s")),
    "exposed_pct": Figure("exposed transfer, median share of the step", "%", _measured(names.EXPOSED_PCT)),
    "mfu_causal_pct": Figure("MFU, causal attention, median", "%", _usual("mfu_causal_pct")),
    "mfu_full_attention_pct": Figure("MFU, full attention, median", "%", _usual("mfu_full_attention_pct")),
    "hfu_pct": Figure("HFU, with recomputation, median", "%", _usual("hfu_pct")),
    "mfu_peak_tflops": Figure("peak that MFU and HFU are shares of", "TFLOP/s", _usual("mfu_peak_tflops")),
    "gpu_peak_gib": Figure("device peak, fullest rank", "GiB", _measured(names.GPU_PEAK_GIB)),
    "host_peak_gib": Figure("host tier peak, fullest rank", "GiB", _measured(names.HOST_PEAK_GIB)),
    "ssd_peak_gib": Figure("SSD tier peak, fullest rank", "GiB", _measured(names.SSD_PEAK_GIB)),
    "num_ranks": Figure("ranks", "", lambda record: record.summary["num_ranks"]),
}


def read_runs(run_dirs: Sequence[Path]) -> list[ComparedRun]:
    """The runs of these folders, in this order.

    Raises:
        InputError: a folder is not a run's, or its configuration cannot be read; names the folder.
    """
    short = [path.resolve().name for path in run_dirs]
    return [
        _read(path, name if short.count(name) == 1 else str(path)) for path, name in zip(run_dirs, short, strict=True)
    ]


def differing(tables: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys whose values are not the same in all tables, with a value for each; ABSENT where a table lacks the key."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key, ABSENT) for table in tables] for key in keys}
    return {key: row for key, row in sorted(rows.items()) if len(set(row)) > 1}


def cautions(runs: Sequence[ComparedRun]) -> list[str]:
    """What makes figures of these runs incomparable, in sentences."""
    found = []
    if len({run.source.get("data digest") for run in runs}) > 1:
        found.append("The runs have different token rows, so their losses are of different text.")
    batches = [{key: run.config[key] for key in BATCH_KEYS if key in run.config} for run in runs]
    if any(ABSENT not in row for row in differing(batches).values()):
        found.append("Their steps have different tokens: compare losses by tokens, not by steps.")
    peaks = {run.figure("mfu_peak_tflops") for run in runs} - {None}
    if len(peaks) > 1:
        found.append("MFU and HFU are shares of different peaks.")
    if len({run.source.get("hardware") for run in runs}) > 1:
        found.append("The runs are planned for different hardware.")
    if open_runs := [run.name for run in runs if run.outcome != "finished"]:
        found.append(f"Not finished: {', '.join(open_runs)}.")
    return found


def to_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The comparison for programs: figures of each run by name, and what differs."""
    return {
        "runs": [
            {
                "name": run.name,
                "run_dir": str(run.run_dir),
                "outcome": run.outcome,
                "plan": None if run.plan is None else run.plan["name"],
                "figures": {name: run.figure(name) for name in FIGURES},
                "predicted_against_measured": run.record.summary["predicted_against_measured"],
            }
            for run in runs
        ],
        "config": differing([_computing(run.config) for run in runs]),
        "source": differing([run.source for run in runs]),
        "cautions": cautions(runs),
    }


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> None:
    """Write the page that shows these runs side by side; whole or not at all."""
    folder.write_text(
        path,
        template("comparison.html").render(
            title=f"{len(runs)} runs compared",
            names=[run.name for run in runs],
            outcomes=[run.outcome for run in runs],
            links=[_report_link(run, path) for run in runs],
            colors=[pictures.color(index) for index in range(len(runs))],
            cautions=cautions(runs),
            figures=_figure_rows(runs),
            predicted=_predicted_rows(runs),
            pictures=pictures.draw([(run.name, run.record.steps) for run in runs]),
            config=differing([_computing(run.config) for run in runs]),
            source=differing([run.source for run in runs]),
            plans=[(run.name, run.plan) for run in runs if run.plan is not None],
        ),
    )


def text_table(runs: Sequence[ComparedRun]) -> str:
    """The comparison for a terminal: a line for each run, then the keys that differ."""
    columns = {
        "steps": ("steps", 0),
        "loss": ("loss", 4),
        "tokens/s": ("tokens_per_s_per_gpu", 4),
        "MFU %": ("mfu_causal_pct", 3),
        "step s": ("step_s", 3),
        "device GiB": ("gpu_peak_gib", 3),
        "host GiB": ("host_peak_gib", 3),
        "SSD GiB": ("ssd_peak_gib", 3),
    }
    rows = [["run", "plan", *columns]]
    for run in runs:
        values = [number(run.figure(name), digits or 9) for name, digits in columns.values()]
        ending = "" if run.outcome == "finished" else f" ({run.outcome})"
        rows.append([run.name + ending, ABSENT if run.plan is None else str(run.plan["name"]), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    for heading, found in (
        ("what differs in the configuration:", differing([_computing(run.config) for run in runs])),
        ("what differs in code, data and machine:", differing([run.source for run in runs])),
    ):
        if found:
            lines += ["", heading, *(f"  {key}: {' | '.join(row)}" for key, row in found.items())]
    return "\n".join(lines + [""] * bool(cautions(runs)) + cautions(runs))


def _read(run_dir: Path, name: str) -> ComparedRun:
    import yaml

    record = read_run(run_dir)
    path = run_dir / folder.CONFIG_FILE
    try:
        parsed = yaml.safe_load(read_regular(path).decode("utf-8")) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({error}); mend or remove it", id=ErrorId.data_wrong) from error
    config = flatten(parsed if isinstance(parsed, Mapping) else {})
    plan = read_plan_tables(run_dir / folder.PLAN_FILE)
    return ComparedRun(name, run_dir, record, config, _source(record.summary), plan)


def _source(summary: Mapping[str, Any]) -> dict[str, str]:
    provenance, facts = (
        value if isinstance(value := summary.get(key), Mapping) else {} for key in ("provenance", "facts")
    )
    data, hardware = (value if isinstance(value := facts.get(key), Mapping) else {} for key in ("data", "hardware"))
    found = {
        "commit": str(provenance.get("commit", "unknown")) + (" with local changes" if provenance.get("dirty") else ""),
        "data digest": str(data.get("digest", "unknown")),
        "hardware": str(hardware.get("name", "unknown")),
        "rates": str(facts.get("rates", "unknown")),
    }
    for part in ("versions", "machine"):
        values = provenance.get(part)
        found |= {str(key): str(value) for key, value in values.items()} if isinstance(values, Mapping) else {}
    return found


def _computing(config: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in config.items() if key not in PLACE_KEYS and not key.startswith(RECORDS)}


def _report_link(run: ComparedRun, page: Path) -> str:
    report = run.run_dir / folder.REPORT_FILE
    return quote(os.path.relpath(report.resolve(), page.resolve().parent)) if report.exists() else ""


def _figure_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(words, (value, its ratio to the first run's) for each run); figures that no run has are left out."""
    rows = []
    for name, figure in FIGURES.items():
        values = [run.figure(name) for run in runs]
        if all(value is None for value in values):
            continue
        first = values[0]
        ratios = ["" if not first or value is None or value == first else f"x {value / first:.3g}" for value in values]
        texts = [with_unit(value, figure.unit).strip() for value in values]
        rows.append((figure.what, list(zip(texts, ratios, strict=True))))
    return rows


def _predicted_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(words, predicted, measured and error for each run) of the lines that a run predicted."""
    rows = zip(*(run.record.summary["predicted_against_measured"] for run in runs), strict=True)
    return [
        (row[0]["what"], [predicted_cell(line) for line in row])
        for row in rows
        if any(line["predicted"] for line in row)
    ]
