"""Finishes the records of a run whose process was killed. No mlflow, no torch.

Ranks write their reports into journals and also send them to the driver. What a killed driver had not written is
still there: it goes into the run's records, which then say that the run was lost.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from headrace.platform.tracking import run_folder as folder
from headrace.platform.tracking.aggregate import aggregate, step_line
from headrace.platform.tracking.run_owner import own_run_folder, owner_of_run
from headrace.platform.tracking.summary import summarize
from headrace.platform.tracking.transfers import merge_transfers, moved_bytes
from headrace.storage.core.errors import ErrorId, HeadraceError, InputError
from headrace.storage.core.json_lines import JsonLines, legal_json, read_lines
from headrace.storage.core.locks import locked
from headrace.workers.actors.journal import journals_of, read_journal

RUNNING, LOST = "running", "lost"
# Ranks end a moment after their driver; under Ray, some seconds.
RANKS_END_S = 20.0


def settle_if_lost(run_dir: Path) -> None:
    """`settle` for a reader: nothing happens while the run is not finished, or if the folder cannot be written."""
    if _outcome(run_dir) == RUNNING and owner_of_run(run_dir) is None:
        with suppress(InputError), own_run_folder(run_dir):
            settle(run_dir)


def settle(run_dir: Path) -> None:
    """Finish the records of the run before this one. The caller owns the folder; a run that ended itself stays as is.

    Raises:
        InputError: a rank of the killed run still runs (run_folder_in_use). OSError: the folder cannot be written.
    """
    journals = journals_of(run_dir)
    if not journals and _outcome(run_dir) != RUNNING:
        return
    with ExitStack() as closing:
        for path in [path for by_rank in journals.values() for path in by_rank.values()]:
            try:
                closing.enter_context(locked(path, RANKS_END_S))
            except TimeoutError:
                raise InputError(
                    f"{run_dir}: the earlier process of this run was killed, and one of its ranks still runs (it holds "
                    f"{path}). End it, or wait",
                    id=ErrorId.run_folder_in_use,
                ) from None
        _replay(run_dir, journals)
        for by_rank in journals.values():
            for path in by_rank.values():
                path.unlink()
    with suppress(HeadraceError):  # damaged parts stay where they are
        merge_transfers(run_dir)
    there = folder.read_json(run_dir / folder.SUMMARY_FILE)
    if there.get("outcome") != RUNNING:
        return
    steps = folder.read_metrics(run_dir / folder.METRICS_FILE)
    began = there.get("started_unix_s")
    ended = steps[-1].get(folder.UNIX_S) if steps else None
    summary = {
        **there,
        "outcome": LOST,
        "wall_s": max(0.0, ended - began) if isinstance(began, float) and isinstance(ended, float) else None,
        **summarize(steps, folder.read_predicted(run_dir), there.get("num_ranks")),
        "moved_bytes": moved_bytes(run_dir / folder.TRANSFERS_FILE),
    }
    folder.write_json(run_dir / folder.SUMMARY_FILE, summary)


def _replay(run_dir: Path, journals: dict[int, dict[int, Path]]) -> None:
    """Write the steps and events of the journals that are not in the records."""
    metrics, events = JsonLines(run_dir / folder.METRICS_FILE), JsonLines(run_dir / folder.EVENTS_FILE)
    written = {line[folder.STEP]: line for line in folder.read_metrics(metrics.path)}
    told = {(line.get("kind"), line.get("text")) for line, _ in read_lines(events.path)}
    for by_rank in journals.values():
        unix_s = max(path.stat().st_mtime for path in by_rank.values())
        steps: dict[int, dict[int, Any]] = {}
        for rank, path in sorted(by_rank.items()):
            for report in read_journal(path):
                steps.setdefault(report.step, {})[rank] = report.metrics
                for event in report.events:
                    if (event.kind, event.text) not in told:
                        facts = {"kind": event.kind, "text": event.text, "facts": event.facts}
                        events.append({folder.UNIX_S: unix_s, **facts})
        for step in sorted(steps):
            line = step_line(step, aggregate(steps[step]), unix_s=unix_s, num_ranks=len(steps[step]))
            if not _is_in(written.get(step), line):
                metrics.append(line | ({folder.FIRST_OF_START: True} if step == min(steps) else {}))
    if _outcome(run_dir) == RUNNING:
        last = next((line[folder.STEP] for line in reversed(folder.read_metrics(metrics.path))), 0)
        text = f"the process was killed; the last step that it or its ranks recorded is {last}"
        events.append({folder.UNIX_S: time.time(), "kind": "run_lost", "text": text, "facts": {}})
    metrics.close()
    events.close()


def _is_in(there: dict[str, Any] | None, line: dict[str, Any]) -> bool:
    """Whether the records have the step: as this group did it, or by more ranks. Times tell two runs of it apart."""
    if there is None:
        return False
    if there.get(folder.NUM_RANKS, 0) > line[folder.NUM_RANKS]:
        return True
    wanted = {name: value for name, value in legal_json(line).items() if name != folder.UNIX_S and value is not None}
    return all(there.get(name) == value for name, value in wanted.items())


def _outcome(run_dir: Path) -> str:
    return str(folder.read_json(run_dir / folder.SUMMARY_FILE).get("outcome", ""))
