"""`headrace plan` about more than one plan: a sweep over lengths, the longest length, two plans side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.platform.config.rules import check_config
from headrace.platform.config.schema import RunConfig, flat_items
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.explain import layer_lines
from headrace.platform.planning.lengths import explain_plans, plans_to_json
from headrace.platform.planning.many import (
    MOST_TOKENS,
    Longest,
    answer,
    check_one_length,
    lengths_between,
    short,
    sweep_table,
)
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan

LENGTH_KEY = "data.seq_len"
UNITS = {"k": 1 << 10, "m": 1 << 20}
# What is compared: label, group of the answer, name.
FIGURES = {
    "step s": "step_s",
    "tokens/s per GPU": "tokens_per_s_per_gpu",
    "MFU causal %": "mfu_causal_pct",
    "HFU %": "hfu_pct",
    "device GiB": "gpu_peak_gib",
    "host GiB": "host_peak_gib",
    "SSD GiB": "ssd_peak_gib",
    "to the host GB": "d2h_gb",
    "from the host GB": "h2d_gb",
    "SSD write GB": "ssd_write_gb",
    "SSD read GB": "ssd_read_gb",
    "exposed s": "exposed_s",
}
WIDTH = 28


def read_lengths(text: str) -> list[int]:
    """The lengths of `sweep=`: `data.seq_len:32k..4m` is 32768, doubled while below 4194304, and that.

    Raises:
        InputError: another key, no range, or one that is empty.
    """
    key, colon, ends = text.partition(":")
    first, dots, last = ends.partition("..")
    if key != LENGTH_KEY or not colon or not dots:
        raise InputError(f"sweep={text}: write sweep={LENGTH_KEY}:FIRST..LAST, such as {LENGTH_KEY}:32k..4m")
    low, high = _tokens(text, first), _tokens(text, last)
    if not 1 <= low <= high <= MOST_TOKENS:
        raise InputError(f"sweep={text}: the first length is at least 1, the last not below it, at most {MOST_TOKENS}")
    return lengths_between(low, high)


def _tokens(text: str, word: str) -> int:
    number, size = (word[:-1], UNITS[word[-1].lower()]) if word[-1:].lower() in UNITS else (word, 1)
    if not number.isascii() or not number.isdigit():
        raise InputError(f"sweep={text}: {word!r} is no length; write 32768, 32k or 4m")
    return int(number) * size


def sweep_answers(config: RunConfig, request: PlanRequest, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The answer at every length.

    Raises:
        InputError: rows of the run cannot have another length, or the ranks cannot share one of these.
    """
    one_rank(config, "sweep")
    check_one_length(request, "sweep")
    for length in lengths:
        check_config(replace(config, data=replace(config.data, seq_len=length)))
    return [answer(replace(request, seq_len=length)) for length in lengths]


def one_rank(config: RunConfig, word: str) -> None:
    """Refuse a question about many plans of a pipeline, whose ranks have a plan each.

    Raises:
        InputError: parallel.pipeline is above 1.
    """
    if config.parallel.pipeline > 1:
        raise InputError(
            f"{word}: parallel.pipeline={config.parallel.pipeline} has a plan for each rank; ask for one length at a "
            "time, or set parallel.pipeline=1"
        )


def sweep_text(answers: Sequence[dict[str, Any]], request: PlanRequest, picture: Path) -> str:
    """The table, and where the picture is."""
    return f"{sweep_title(request)}\n\n{sweep_table(answers)}\n\npicture: {picture}"


def sweep_title(request: PlanRequest) -> str:
    """What was swept."""
    return (
        f"memory={request.preset.value}: {request.model.name}, rows of several lengths x {request.batch_size} x "
        f"{request.micro_batches} micro-batches, on {request.profile.name}"
    )


def longest_text(found: Longest) -> str:
    """The longest row and its plan."""
    head = f"longest row that fits: {found.request.seq_len} tokens, in units of {found.unit}"
    if not found.is_bounded:
        head += "; no budget ends it: set tiers.host.budget_gib and tiers.ssd.budget_gib"
    return f"{head}\n\n{explain_plans({found.request.seq_len: found.plan}, found.request)}"


def longest_json(found: Longest) -> dict[str, Any]:
    """The same for programs."""
    plans = {found.request.seq_len: found.plan}
    head = {"max_seq_len": found.request.seq_len, "unit": found.unit, "is_bounded": found.is_bounded}
    return head | plans_to_json(plans, found.request)


def compared_words(text: str, words: Sequence[str]) -> dict[str, list[str]]:
    """The words of both plans of `compare=A,B`: a preset, or a configuration as `conf=` takes it.

    Raises:
        InputError: not two different names.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or "" in names or names[0] == names[1]:
        raise InputError(f"compare={text}: two different presets or configurations, such as compare=recompute,auto")
    presets = [preset.value for preset in MemoryPreset]
    return {name: [*words, f"memory={name}"] if name in presets else [*words, f"conf={name}"] for name in names}


class Side:
    """One of the plans that are compared.

    Args:
        plan: None: it does not fit.
    """

    def __init__(self, name: str, config: RunConfig, request: PlanRequest) -> None:
        self.name, self.config, self.request = name, config, request
        self.answer = answer(request)
        plan = self.answer["plan"]
        self.plan = None if plan is None else MemoryPlan.from_dict(plan)


def comparison(sides: Sequence[Side]) -> dict[str, Any]:
    """For programs: both answers by name, and the keys that differ, with the values.

    Raises:
        Refused: neither fits: the refusal of the first.
    """
    if not any(side.plan for side in sides):
        solve_plan(sides[0].request)
    values = [dict(flat_items(side.config)) for side in sides]
    differs = {
        key: [str(own.get(key)) for own in values]
        for key in dict.fromkeys([*values[0], *values[1]])
        if values[0].get(key) != values[1].get(key)
    }
    return {"plans": {side.name: side.answer for side in sides}, "differs": differs}


def comparison_text(sides: Sequence[Side], found: Mapping[str, Any]) -> str:
    """Both plans side by side, at most 120 columns."""
    answers = [side.answer for side in sides]
    rows = [("", [side.name for side in sides])]
    rows.append(("fits", ["yes" if a["fits"] else "no: " + ", ".join(a["binding"]) for a in answers]))
    rows.append(("sweep", ["-" if s.plan is None else s.plan.sweep.value.replace("_", " ") for s in sides]))
    for label, name in FIGURES.items():
        both = [a["predicted"][name] for a in answers]
        cells = [short(value) for value in both]
        if None not in both and both[0]:
            cells.append(f"x {both[1] / both[0]:.3g}")
        rows.append((label, cells))
    for tier in answers[0]["tiers"]:
        budgets = [a["tiers"][tier]["budget_bytes"] for a in answers]
        rows.append((f"{tier} budget GiB", [short(None if b is None else b / 2**30) for b in budgets]))
    text = [f"{label:<20}" + "".join(f"{cell:<{WIDTH}}" for cell in cells).rstrip() for label, cells in rows]
    for side in sides:
        if side.plan is not None:
            text += ["", f"{side.name}:", *layer_lines(side.plan, side.request.with_cuts(side.plan.cuts))]
    text += ["", "keys that differ:" if found["differs"] else "no key differs"]
    text += [f"  {key}: {' | '.join(values)}" for key, values in found["differs"].items()]
    return "\n".join(line[:120] for line in text)
