"""The memory plan of a run as tables, from plan.json. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from headrace.platform.report.figures import with_unit
from headrace.platform.tracking import run_folder as folder
from headrace.storage.core.errors import ErrorId, InputError
from headrace.workers.telemetry import names
from headrace.workers.train.predicted import PEAKS

# One word for one place: the plan calls the device's memory hbm, on a CPU too.
PLACES = {"hbm": "device"}


def read_plan_tables(path: Path) -> dict[str, Any] | None:
    """The tables of plan.json; None where the file is missing or cut short.

    Raises:
        InputError: its values are not those of a plan.
    """
    try:
        return plan_tables(folder.read_json(path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its values are not those of a memory plan ({type(error).__name__}: {error}); remove it, and "
            "the report is written without the plan",
            id=ErrorId.data_wrong,
        ) from error


def plan_tables(plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """One row for each run of equal layers, one column for each tensor: where it waits, by stretches of tokens."""
    layers, table = plan.get("layers"), plan.get("table")
    if not layers or not table:
        return None
    rows, at = [], 0
    tensors = list(dict.fromkeys(name for layer in table for name in layer))
    for index, group in groupby(layers):
        num = len(list(group))
        span = f"{at}" if num == 1 else f"{at} to {at + num - 1}"
        rows.append((span, [_stretches(table[index].get(name, [])) for name in tensors]))
        at += num
    facts = f"plan {plan['name']}, sweep {plan['sweep']}, tiles of {plan['cuts']['token_tile']} tokens, "
    facts += f"loads start {plan['prefetch_layers']} layers ahead; tensors without a column are computed again"
    if codec := plan["cuts"].get("codec"):
        facts += f"; lossy: what is placed tile by tile is held in {codec}"
    if pages := plan.get("pages"):
        facts += f"; lossy: a chunk reads at most {pages['budget']} pages of {pages['page']} tokens of earlier chunks"
    return {
        "name": str(plan["name"]),
        "facts": facts,
        "tensors": tensors,
        "rows": rows,
        "lengths": _lengths(plan.get("buckets") or []),
        "changes": [_change(entry) for entry in plan.get("replans") or []],
    }


def _change(entry: Mapping[str, Any]) -> list[str]:
    """A change of plan while the run went on: the first step under the new plan, why, and steps before and after."""
    steps = [with_unit(entry[name], "s") for name in ("step_s", "new_step_s")]
    return [f"{entry['first_step']:d}", str(entry["why"]), *steps]


def _lengths(buckets: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each length of the rows: what its plan predicts."""
    found = []
    for row in buckets:
        predicted = row["plan"]["predicted"]
        peaks = [with_unit(predicted.get(name), "GiB") for name in PEAKS]
        share, step = f"{100 * row['share']:.3g} %", with_unit(predicted.get(names.STEP_S), "s")
        found.append([f"{row['seq_len']:d}", f"{row['batch_size']:d}", share, *peaks, step])
    return found


def _stretches(row: Sequence[tuple[int, int | None, str]]) -> str:
    places = [(begin, PLACES.get(place, place)) for begin, _, place in row] or [(0, "recompute")]
    return ", ".join(place if begin == 0 else f"{place} from token {begin}" for begin, place in places)
