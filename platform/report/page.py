"""report.html: one page that needs nothing else. Written from the run folder's files, whatever of them is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import jinja2

from headrace.platform.report import pictures
from headrace.platform.report.figures import count_text, number, with_unit
from headrace.platform.report.gantt import read_step, step_picture
from headrace.platform.report.occupancy import MAX_MOVES, Moves, read_moves
from headrace.platform.report.plan_tables import read_plan_tables
from headrace.platform.report.run_record import read_run
from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.mlflow_facts import ui_command
from headrace.platform.tracking.mlflow_store import default_store
from headrace.platform.tracking.settle import LOST, RUNNING
from headrace.platform.tracking.summary import series, warm_steps
from headrace.storage.core.json_lines import read_lines
from headrace.storage.core.outside import read_regular
from headrace.workers.telemetry import names

MLFLOW_UI = "http://127.0.0.1:5000"
MAX_LOGS = 16
ENDS = ("run_failed", "run_lost", "stop_requested")
_ENDED = {"stopped": "stopped", "lost": "was lost"}
# A prediction further off than this is marked.
FAR_PCT = 10.0
DRIVE_LINES = {
    names.SSD_WRITTEN_TB: ("written to the drive by all runs", "TB"),
    names.SSD_LIFE_USED_PCT: ("of the drive's rated life", "%"),
    names.SSD_BUDGET_USED_PCT: ("of the budget up to today", "%"),
    names.SSD_DAYS_LEFT: ("until the rating is used up, at this run's rate", "days"),
}
DRIFT_LINES = {
    names.D2H_DRIFT_PCT: "rate to the host tier",
    names.H2D_DRIFT_PCT: "rate from the host tier",
    names.SSD_WRITE_DRIFT_PCT: "rate to the SSD",
    names.SSD_READ_DRIFT_PCT: "rate from the SSD",
}


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run folder, also of a run that was killed or still goes on.

    Returns:
        The page's path.

    Raises:
        InputError: the folder holds neither a configuration nor metrics.
    """
    path = run_dir / folder.REPORT_FILE
    folder.write_text(path, render(run_dir))
    return path


def render(run_dir: Path, *, refresh_s: int | None = None) -> str:
    """The page as text.

    Args:
        refresh_s: a browser loads the page of a run that goes on again after so many seconds; None never.

    Raises:
        InputError: not a run folder, or a plan that is none.
    """
    steps, summary = read_run(run_dir)
    events = [line for line, _ in read_lines(run_dir / folder.EVENTS_FILE)]
    outcome, facts = str(summary["outcome"]), _mapping(summary.get("facts"))
    source, started = _mapping(summary.get("provenance")), summary.get("started_unix_s")
    moves, num_moves = read_moves(run_dir / folder.TRANSFERS_FILE)
    return template("page.html").render(
        name=run_dir.resolve().name,
        run_dir=str(run_dir),
        outcome=outcome,
        refresh_s=refresh_s if outcome == RUNNING else None,
        kind=outcome if outcome in ("finished", "stopped", "running") else "failed",
        at_hand=_at_hand(run_dir, outcome, int(summary["last_step"])),
        started=None if started is None else f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M}",
        num_ranks=summary.get("num_ranks", 1),
        ended=_ENDED.get(outcome, "failed"),
        reasons=[] if outcome in ("finished", RUNNING) else _reasons(facts, events),
        cards=_cards(summary),
        links=linked_files(run_dir),
        mlflow=_mlflow(run_dir),
        moved=num_moves,
        pictures=_pictures(steps, run_dir, moves, num_moves),
        comparison=_comparison(summary),
        drive=_drive(steps),
        sparse=_sparse(steps),
        events=[_event(event) for event in events[-500:]],
        plan=read_plan_tables(run_dir / folder.PLAN_FILE),
        changed=_changed(facts.get("changed")),
        texts=_texts(run_dir, summary),
        commit=source.get("commit", "unknown"),
        dirty=source.get("dirty"),
    )


def _at_hand(run_dir: Path, outcome: str, last_step: int) -> str:
    """How far the step is that a run is in, or was in when it was killed."""
    there = folder.read_json(run_dir / folder.PART_FILE)
    step, part, unix_s = (there.get(name) for name in (folder.STEP, folder.PART, folder.UNIX_S))
    if not isinstance(step, int) or not isinstance(unix_s, float):
        return ""
    if outcome not in (RUNNING, LOST) or step <= last_step:
        return ""
    return f"step {step}: {part} at {datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def template(name: str) -> jinja2.Template:
    """A page's template in this folder: text is escaped, a missing variable is an error."""
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options).get_template(name)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _reasons(facts: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why a run did not finish, in the words of its own records."""
    said = [str(event.get("text", "")) for event in events if event.get("kind") in ENDS]
    reason = str(facts.get("error") or (said[-1] if said else ""))
    failures = facts.get("failures")
    earlier = [str(text) for text in (failures if isinstance(failures, list) else ()) if str(text) not in reason]
    return [reason or "No reason was recorded: the process ended without a message.", *earlier]


def linked_files(run_dir: Path) -> list[tuple[str, str]]:
    """Files of the folder that the page links to: (link, text)."""
    files = [folder.CONFIG_FILE, folder.PLAN_FILE, folder.METRICS_FILE, folder.EVENTS_FILE, folder.SUMMARY_FILE]
    logs = sorted((run_dir / "logs").glob("*"), key=lambda path: (len(path.name), path.name))
    traces = sorted(run_dir.glob("ranks/rank0/trace_step*.json.gz"))
    paths = [path for path in (*(run_dir / name for name in files), *logs[:MAX_LOGS], *traces) if path.is_file()]
    links = [(quote(path.relative_to(run_dir).as_posix()), path.name) for path in paths]
    return links + ([("", f"{len(logs) - MAX_LOGS} more in logs/")] if len(logs) > MAX_LOGS else [])


def _mlflow(run_dir: Path) -> dict[str, str] | None:
    """Where the run is in MLflow, and how its UI is started where that is not running already."""
    state = folder.read_json(run_dir / folder.MLFLOW_FILE)
    if not isinstance(run_id := state.get("run_id"), str):
        return None
    uri = str(state.get("tracking_uri", ""))
    if uri.startswith(("http://", "https://")):
        return {"href": f"{uri.rstrip('/')}/#/runs/{run_id}", "start": ""}
    config = TrackingConfig(tracking_uri=None if uri == default_store(run_dir.resolve().parent) else uri)
    return {"href": f"{MLFLOW_UI}/#/runs/{run_id}", "start": ui_command(run_dir, config)}


def _cards(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    loss, usual = summary["loss"], summary["median"]
    total, peak = summary.get("num_steps"), usual.get("mfu_peak_tflops")
    share = "share of an unknown peak" if peak is None else f"100 % is {number(peak, 3)} TFLOP/s"
    return [
        (f"{summary['last_step']}" + (f" of {total}" if total else ""), "steps"),
        (number(loss["first"], 4) + " → " + number(loss["mean_of_last_5"], 4), "loss, first → mean of last 5"),
        (number(usual["tokens_per_s_per_gpu"], 4), "tokens/s per GPU (median)"),
        (number(usual["mfu_causal_pct"], 3) + " %", f"MFU, causal attention (median); {share}"),
        (number(usual["step_s"], 3) + " s", "step time (median)"),
        (count_text(summary["tokens_seen"]), "tokens seen"),
    ]


def _pictures(steps: Sequence[Mapping[str, Any]], run_dir: Path, moves: Moves, num_moves: int) -> list[dict[str, str]]:
    cut = f", the last {MAX_MOVES:,} of {num_moves:,} moves" if num_moves > MAX_MOVES else ""
    found = [
        ("Loss", pictures.loss_picture(steps), "Sum over valid targets of the global batch, divided by their count."),
        (
            "Page-sparse against dense attention",
            pictures.sparse_picture(steps),
            "The same weights on the same held-out rows. The run trains with page-sparse attention, which is lossy.",
        ),
        ("Learning rate and gradient", pictures.optimizer_picture(steps), "The norm of the gradient before clipping."),
        (
            "Model FLOPs utilisation",
            pictures.mfu_picture(steps),
            "Three formulas; do not compare values of different formulas.",
        ),
        ("Memory by tier, step by step", pictures.peaks_picture(steps), "Peak of every step."),
        (
            "Memory by tensor, host and SSD",
            pictures.tensors_picture(steps),
            "Peak of every tensor by itself, all layers. The plan says which ones stay on the device.",
        ),
        (
            "Step time",
            pictures.speed_picture(steps),
            "Exposed transfer: time in which the step waited and computed nothing.",
        ),
        ("Tiers over time", pictures.tiers_picture(moves, last_steps=None), f"From the transfer log, its peaks{cut}."),
        ("Tiers over time, the last two steps", pictures.tiers_picture(moves, last_steps=2), "Every single move."),
    ]
    shown = [{"title": title, "svg": svg, "caption": text, "kind": ""} for title, svg, text in found if svg is not None]
    if (step := read_step(run_dir, moves)) is not None:
        text = "Numbers are blocks. A bar of compute includes the time that the block waits."
        shown.append({"title": step.title, "svg": step_picture(step), "caption": text, "kind": "wide"})
    return shown


def _comparison(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    # A tier that is off is left out: nothing was planned there and nothing was there.
    return [
        predicted_cell(line)
        for line in summary["predicted_against_measured"]
        if line["predicted"] or line["measured"] or line["name"] == names.EXPOSED_PCT
    ]


def predicted_cell(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of predicted against measured as texts, and whether the prediction is far off."""
    error = line["error_pct"]
    return {
        "what": line["what"],
        "predicted": with_unit(line["predicted"], line["unit"]),
        "measured": with_unit(line["measured"], line["unit"]),
        "error": "" if error is None else f"{error:+.1f} %",
        "far": error is not None and abs(error) > FAR_PCT,
    }


def _drive(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """The drive's life at the last step, and how far the tiers' rates were from the profile's."""
    rows = []
    for name, (what, unit) in DRIVE_LINES.items():
        if values := series(steps, name):
            rows.append((what, with_unit(values[-1], unit), ""))
    for name, what in DRIFT_LINES.items():
        if values := series(warm_steps(steps), name):
            rows.append((what, f"{median(values):+.0f} %", f"lowest {min(values):+.0f} %"))
    return rows


def _sparse(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Loss with dense and with page-sparse attention, last and worst, and the share of the pages that was read."""
    gaps = series(steps, names.SPARSE_LOSS_GAP)
    dense, sparse = (series(steps, name) for name in (names.SPARSE_LOSS_DENSE, names.SPARSE_LOSS_SPARSE))
    rows = []
    if gaps:
        rows.append(("held-out loss, dense attention", number(dense[-1], 5), ""))
        rows.append(("held-out loss, page-sparse attention", number(sparse[-1], 5), ""))
        rows.append(("page-sparse minus dense", f"{gaps[-1]:+.3g}", f"largest {max(gaps, key=abs):+.3g}"))
    if shares := series(steps, names.SPARSE_PAGES_READ_PCT):
        rows.append(("pages read, of those before the chunks", f"{median(shares):.3g} %", ""))
    return rows


def _event(event: Mapping[str, Any]) -> tuple[str, str, str]:
    when = event.get(folder.UNIX_S)
    clock = f"{datetime.fromtimestamp(when, UTC):%H:%M:%S}" if isinstance(when, int | float) else ""
    return clock, str(event.get("kind", "")), str(event.get("text", ""))


def _changed(changed: object) -> list[tuple[str, Any, Any]] | None:
    """(key, was, now) where the run differs from the experiment that it chose; None where that is not known."""
    if not isinstance(changed, Mapping):
        return None
    return [(str(key), *pair) for key, pair in sorted(changed.items()) if isinstance(pair, list) and len(pair) == 2]


def _texts(run_dir: Path, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, texts = run_dir / folder.CONFIG_FILE, []
    if config.exists():
        texts.append((folder.CONFIG_FILE, read_regular(config).decode("utf-8", errors="replace")))
    for title, value in {"Facts": summary.get("facts"), "Source and machine": summary.get("provenance")}.items():
        if value:
            texts.append((title, json.dumps(value, indent=1, ensure_ascii=False)))
    return texts
