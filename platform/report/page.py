"""report.html: one page that needs nothing else. Written from the run folder's files, whatever of them is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

from headrace.platform.report import pictures
from headrace.platform.report.gantt import read_step, step_picture
from headrace.platform.report.occupancy import MAX_MOVES, read_moves
from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.config import TrackingConfig
from headrace.platform.tracking.mlflow_facts import ui_command
from headrace.platform.tracking.mlflow_store import default_store
from headrace.platform.tracking.run_owner import owner_of_run
from headrace.platform.tracking.settle import LOST, RUNNING
from headrace.platform.tracking.summary import series, summarize, warm_steps
from headrace.storage.core.errors import InputError
from headrace.storage.core.json_lines import read_lines
from headrace.storage.core.outside import read_regular
from headrace.workers.telemetry import names

STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --back: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0 0 4px; }
.sub { color: var(--soft); margin: 2px 0 20px; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 10px; font-size: 13px; font-weight: 600;
  vertical-align: 4px; }
.finished { background: #d9f2e3; color: #1b6b42; } .stopped, .running { background: #fdf0d5; color: #8a5a00; }
.failed, .lost { background: #fbdcdc; color: #9b1c1c; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; }
.card, figure, .panel { background: white; border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 12px 14px; } .card b { display: block; font-size: 21px; font-weight: 600; }
.card span { color: var(--soft); font-size: 13px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 14px; } figure svg { width: 100%; height: auto; display: block; }
figure.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
.panel { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: 13px; }
td.n, th.n { text-align: right; white-space: nowrap; } .off { color: #b7410e; }
pre { margin: 0; padding: 14px; font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.reason { padding: 12px 16px; margin: 0 0 16px; border-left: 4px solid #9b1c1c; overflow-wrap: anywhere; }
.reason p { margin: 4px 0; white-space: pre-wrap; } .links { margin: 14px 0 0; } code { font-size: 13px; }
details { margin-top: 10px; } summary { cursor: pointer; }
footer { margin-top: 36px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
"""
MLFLOW_UI = "http://127.0.0.1:5000"
MAX_LOGS = 16
ENDS = ("run_failed", "run_lost", "stop_requested")
_ENDED = {"stopped": "stopped", "lost": "was lost"}
# One word for one place: the plan calls the device's memory hbm, on a CPU too.
PLACES = {"hbm": "device"}
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
    if not (run_dir / folder.METRICS_FILE).exists() and not (run_dir / folder.CONFIG_FILE).exists():
        raise InputError(f"{run_dir}: not a run folder, it has neither {folder.CONFIG_FILE} nor {folder.METRICS_FILE}")
    path = run_dir / folder.REPORT_FILE
    folder.write_text(path, render(run_dir))
    return path


def render(run_dir: Path) -> str:
    """The page as text."""
    steps = folder.read_metrics(run_dir / folder.METRICS_FILE)
    plan = folder.read_json(run_dir / folder.PLAN_FILE)
    # The files are the truth; summary.json adds what they cannot say. A killed run has an old one.
    there = folder.read_json(run_dir / folder.SUMMARY_FILE)
    summary = {**there, **summarize(steps, plan.get("predicted") or {}, there.get("num_ranks"))}
    if summary.get("outcome", RUNNING) == RUNNING and owner_of_run(run_dir) is None:
        summary["outcome"] = LOST
    events = [line for line, _ in read_lines(run_dir / folder.EVENTS_FILE)]
    name = run_dir.resolve().name
    body = [
        _head(name, summary),
        _failure(summary, events, run_dir),
        _cards(summary),
        _links(run_dir),
        _pictures(steps, run_dir),
        _comparison(summary),
        _drive(steps),
        _events(events),
        _plan(plan),
        _texts(run_dir, summary),
        _foot(run_dir, summary),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _head(name: str, summary: Mapping[str, Any]) -> str:
    outcome = str(summary["outcome"])
    kind = outcome if outcome in ("finished", "stopped", "running") else "failed"
    started = summary.get("started_unix_s")
    when = "" if started is None else f"started {datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC, "
    ranks = summary.get("num_ranks", 1)
    return (
        f'<h1>{escape(name)} <span class="badge {kind}">{escape(outcome)}</span></h1>'
        f'<p class="sub">{when}{escape(str(ranks))} rank{"s" if ranks != 1 else ""}</p>'
    )


def _failure(summary: Mapping[str, Any], events: Sequence[Mapping[str, Any]], run_dir: Path) -> str:
    """Why a run did not finish, in the words of its own records."""
    if summary["outcome"] in ("finished", RUNNING):
        return ""
    facts = _facts(summary)
    said = [str(event.get("text", "")) for event in events if event.get("kind") in ENDS]
    reason = facts.get("error") or (said[-1] if said else "")
    failures = facts.get("failures")
    earlier = [str(text) for text in (failures if isinstance(failures, list) else ()) if str(text) not in str(reason)]
    lines = [reason or "No reason was recorded: the process ended without a message.", *earlier]
    text = "".join(f"<p>{escape(str(line))}</p>" for line in lines)
    return f'<div class="panel reason"><h3>Why it {_ENDED.get(str(summary["outcome"]), "failed")}</h3>{text}</div>'


def _facts(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    facts = summary.get("facts")
    return facts if isinstance(facts, Mapping) else {}


def _links(run_dir: Path) -> str:
    """Where more is: files of the folder, and the run in MLflow."""
    files = [folder.CONFIG_FILE, folder.PLAN_FILE, folder.METRICS_FILE, folder.EVENTS_FILE, folder.SUMMARY_FILE]
    logs = sorted((run_dir / "logs").glob("*"), key=lambda path: (len(path.name), path.name))
    paths = [path for path in (*(run_dir / name for name in files), *logs[:MAX_LOGS]) if path.is_file()]
    links = [
        f'<a href="{escape(quote(path.relative_to(run_dir).as_posix()))}">{escape(path.name)}</a>' for path in paths
    ]
    if len(logs) > MAX_LOGS:
        links.append(f"{len(logs) - MAX_LOGS} more in logs/")
    state = folder.read_json(run_dir / folder.MLFLOW_FILE)
    if isinstance(run_id := state.get("run_id"), str):
        uri = str(state.get("tracking_uri", ""))
        server = uri.rstrip("/") if uri.startswith(("http://", "https://")) else MLFLOW_UI
        start = "" if server == uri.rstrip("/") else f" (start it: <code>{escape(_ui_words(run_dir, uri))}</code>)"
        links.append(f'<a href="{escape(server)}/#/runs/{escape(run_id)}">the run in MLflow</a>{start}')
    return f'<p class="sub links">{" · ".join(links)}</p>' if links else ""


def _ui_words(run_dir: Path, uri: str) -> str:
    return ui_command(
        run_dir, TrackingConfig(tracking_uri=None if uri == default_store(run_dir.resolve().parent) else uri)
    )


def _cards(summary: Mapping[str, Any]) -> str:
    loss, usual = summary["loss"], summary["median"]
    total = summary.get("num_steps")
    cards = [
        (f"{summary['last_step']}" + (f" of {total}" if total else ""), "steps"),
        (number(loss["first"], 4) + " → " + number(loss["mean_of_last_5"], 4), "loss, first → mean of last 5"),
        (number(usual["tokens_per_s_per_gpu"], 4), "tokens/s per GPU (median)"),
        (number(usual["mfu_causal_pct"], 3) + " %", f"MFU, causal attention (median); {_peak(usual)}"),
        (number(usual["step_s"], 3) + " s", "step time (median)"),
        (_count(summary["tokens_seen"]), "tokens seen"),
    ]
    inside = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    return f'<div class="cards">{inside}</div>'


def _peak(usual: Mapping[str, Any]) -> str:
    peak = usual.get("mfu_peak_tflops")
    return "share of an unknown peak" if peak is None else f"100 % is {number(peak, 3)} TFLOP/s"


def _pictures(steps: Sequence[Mapping[str, Any]], run_dir: Path) -> str:
    moves, num_moves = read_moves(run_dir / folder.TRANSFERS_FILE)
    cut = f", the last {MAX_MOVES:,} of {num_moves:,} moves" if num_moves > MAX_MOVES else ""
    found = [
        ("Loss", pictures.loss_picture(steps), "Sum over valid targets of the global batch, divided by their count."),
        ("Learning rate and gradient", pictures.optimizer_picture(steps), "The norm of the gradient before clipping."),
        (
            "Model FLOPs utilisation",
            pictures.mfu_picture(steps),
            "Three formulas; do not compare values of different formulas.",
        ),
        ("Memory by tier, step by step", pictures.peaks_picture(steps), "Peak of every step."),
        (
            "Step time",
            pictures.speed_picture(steps),
            "Exposed transfer: time in which the step waited and computed nothing.",
        ),
        ("Tiers over time", pictures.tiers_picture(moves, last_steps=None), f"From the transfer log, its peaks{cut}."),
        ("Tiers over time, the last two steps", pictures.tiers_picture(moves, last_steps=2), "Every single move."),
    ]
    shown = "".join(_figure(title, svg, caption) for title, svg, caption in found if svg is not None)
    if (step := read_step(run_dir, moves)) is not None:
        what = "Numbers are blocks. A bar of compute includes the time that the block waits."
        shown += _figure(step.title, step_picture(step), what, kind="wide")
    nothing = "" if num_moves else '<p class="sub">No transfer log: nothing was moved, or the run was cut short.</p>'
    if not shown:
        return "<h2>Pictures</h2><p>No step has been recorded.</p>"
    return f'<h2>Course of the run</h2><div class="pictures">{shown}</div>{nothing}'


def _figure(title: str, svg: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}"><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _comparison(summary: Mapping[str, Any]) -> str:
    rows = []
    for line in summary["predicted_against_measured"]:
        if not line["predicted"] and not line["measured"] and line["name"] != names.EXPOSED_PCT:
            # A tier that is off: nothing was planned there and nothing was there.
            continue
        error = line["error_pct"]
        kind = "n off" if error is not None and abs(error) > FAR_PCT else "n"
        rows.append(
            f"<tr><td>{escape(line['what'])}</td><td class=n>{_with_unit(line['predicted'], line['unit'])}</td>"
            f"<td class=n>{_with_unit(line['measured'], line['unit'])}</td>"
            f'<td class="{kind}">{"" if error is None else f"{error:+.1f} %"}</td></tr>'
        )
    if not rows:
        return ""
    head = "<tr><th></th><th class=n>predicted</th><th class=n>measured</th><th class=n>error</th></tr>"
    return (
        f"<h2>Predicted against measured</h2><div class=panel><table>{head}{''.join(rows)}</table></div>"
        '<p class="sub">Times leave out the first step of every start. A dash: the plan made no prediction, or nothing '
        "was measured.</p>"
    )


def _drive(steps: Sequence[Mapping[str, Any]]) -> str:
    """The drive's life at the last step, and how far the tiers' rates were from the profile's."""
    rows = []
    for name, (what, unit) in DRIVE_LINES.items():
        values = series(steps, name)
        if values:
            rows.append(f"<tr><td>{what}</td><td class=n>{_with_unit(values[-1], unit)}</td><td></td></tr>")
    for name, what in DRIFT_LINES.items():
        values = series(warm_steps(steps), name)
        if values:
            worst = f"lowest {min(values):+.0f} %"
            rows.append(f"<tr><td>{what}</td><td class=n>{median(values):+.0f} %</td><td class=n>{worst}</td></tr>")
    if not rows:
        return ""
    return (
        f"<h2>Drive and tiers</h2><div class=panel><table>{''.join(rows)}</table></div>"
        '<p class="sub">Rates: the median over steps that moved enough, from the profile\'s; negative is slower.</p>'
    )


def _plan(plan: Mapping[str, Any]) -> str:
    """One row for each run of equal layers, one column for each tensor: where it waits, by stretches of tokens."""
    layers, table = plan.get("layers"), plan.get("table")
    if not layers or not table:
        return ""
    rows, at = [], 0
    tensors = list(dict.fromkeys(name for layer in table for name in layer))
    for index, group in groupby(layers):
        num = len(list(group))
        span = f"{at}" if num == 1 else f"{at} to {at + num - 1}"
        cells = "".join(f"<td>{escape(_stretches(table[index].get(name, [])))}</td>" for name in tensors)
        rows.append(f"<tr><td>{span}</td>{cells}</tr>")
        at += num
    head = "<tr><th>layers</th>" + "".join(f"<th>{escape(name)}</th>" for name in tensors) + "</tr>"
    facts = f"plan {plan['name']}, sweep {plan['sweep']}, tiles of {plan['cuts']['token_tile']} tokens, "
    facts += f"loads start {plan['prefetch_layers']} layers ahead; "
    facts += "tensors without a column are computed again"
    return (
        f'<h2>Memory plan</h2><p class="sub">{escape(facts)}</p>'
        f"<div class=panel><table>{head}{''.join(rows)}</table></div>"
    )


def _stretches(row: Sequence[tuple[int, int | None, str]]) -> str:
    places = [(begin, PLACES.get(place, place)) for begin, _, place in row] or [(0, "recompute")]
    return ", ".join(place if begin == 0 else f"{place} from token {begin}" for begin, place in places)


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event in events[-500:]:
        when = event.get(folder.UNIX_S)
        clock = f"{datetime.fromtimestamp(when, UTC):%H:%M:%S}" if isinstance(when, int | float) else ""
        kind, text = escape(str(event.get("kind", ""))), escape(str(event.get("text", "")))
        rows.append(f"<tr><td>{clock}</td><td>{kind}</td><td>{text}</td></tr>")
    head = "<tr><th>UTC</th><th>event</th><th></th></tr>"
    return f"<h2>Events</h2><div class=panel><table>{head}{''.join(rows)}</table></div>"


def _texts(run_dir: Path, summary: Mapping[str, Any]) -> str:
    config = run_dir / folder.CONFIG_FILE
    parts = [_changes(_facts(summary).get("changed"))]
    if config.exists():
        text = read_regular(config).decode("utf-8", errors="replace")
        parts.append(f"<details><summary>{folder.CONFIG_FILE}</summary><pre>{escape(text)}</pre></details>")
    for title, value in {"Facts": summary.get("facts"), "Source and machine": summary.get("provenance")}.items():
        if value:
            text = json.dumps(value, indent=1, ensure_ascii=False)
            parts.append(f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>")
    inside = "".join(parts)
    return f"<h2>Configuration</h2><div class=panel style='padding:12px'>{inside}</div>" if inside else ""


def _changes(changed: Any) -> str:
    """The keys in which the run differs from the experiment that it chose."""
    if not isinstance(changed, Mapping):
        return ""
    pairs = {key: pair for key, pair in changed.items() if isinstance(pair, list) and len(pair) == 2}
    if not pairs:
        return "<p>Nothing was changed: the configuration is that of the experiment.</p>"
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(str(was))}</td><td><b>{escape(str(now))}</b></td></tr>"
        for key, (was, now) in sorted(pairs.items())
    )
    return f"<table><tr><th>changed</th><th>the experiment's</th><th>this run's</th></tr>{rows}</table>"


def _foot(run_dir: Path, summary: Mapping[str, Any]) -> str:
    source = summary.get("provenance") or {}
    dirty = " with local changes" if source.get("dirty") else ""
    return f"<footer>{escape(str(run_dir))}, commit {escape(str(source.get('commit', 'unknown')))}{dirty}</footer>"


def number(value: float | None, digits: int) -> str:
    """A figure with so many significant digits, thousands grouped; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _with_unit(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "GiB" and 0 < abs(value) < 1:
        return f"{number(value * 1024, 4)} MiB"
    return f"{number(value, 4)} {unit}"


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"
