"""`headrace plan`: the memory plan of a run, before the run. No torch, no Ray, under two seconds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from headrace.platform.cli import plan_many as many
from headrace.platform.cli.plan_pipeline import plan_pipeline
from headrace.platform.config.load import load_run_config
from headrace.platform.config.rules_memory import budgets_within_hardware
from headrace.platform.config.schema import RunConfig
from headrace.platform.config.words import environment_words
from headrace.platform.keys import read_keys, split_flags
from headrace.platform.planning.from_config import request_from_config
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.lengths import explain_plans, plans_to_json, solve_plans
from headrace.platform.planning.machine import check_ssd_path, fill_in
from headrace.platform.planning.many import UNIT, longest
from headrace.platform.planning.refuse import Refused
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.step import StepTimeline, step_timeline
from headrace.storage.core.errors import InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.opening import open_prepared
from headrace.workers.telemetry.rate_book import RateBook

USAGE = """\
usage: headrace plan [conf=EXPERIMENT|FILE.yaml] [GROUP=CHOICE ...] [KEY=VALUE ...] [timeline=FILE.png]
                     [trace=FILE.json] [sweep=RANGE | --max-len | compare=A,B] [--json]

Prints where every tensor is stored, the cost, the limiting budget and what would help. Takes the words of
`headrace train`.
  headrace plan experiment=qwen2_5_7b_256k_1xh200
  headrace plan model=llama3_8b hardware=h100_80g data.seq_len=131072 memory=auto tiers.host.budget_gib=200

  timeline=FILE.png   draw a simulated step: compute, copies, drives and network over time
  trace=FILE.json     write it as a Chrome trace (chrome://tracing, Perfetto)
  sweep=data.seq_len:32k..4m   a plan for each length, doubled from the first to the last: a table, and the picture
                      picture=FILE.png (default plan_sweep.png) of step time, MFU and memory
  --max-len           the longest row that fits, a multiple of unit=TOKENS (default 1024)
  compare=A,B         two plans side by side; each a preset of memory= or a configuration as conf= takes it
  --json              one JSON object on one line, last on stdout
If no plan fits: exit code 2 and three changes that would make it fit; with --json also on stdout.
"""
FILE_KEYS = {"timeline": str, "trace": str}
OWN_KEYS = FILE_KEYS | {"sweep": str, "picture": str, "compare": str, "unit": int}
MAX_LEN = "--max-len"
FLAGS = (MAX_LEN, "--json")
PICTURE = "plan_sweep.png"
# Keys that go with a question about many plans.
GOES_WITH = {"picture": "sweep", "unit": MAX_LEN}


def run(argv: Sequence[str]) -> int:
    """Run `headrace plan ...`.

    Raises:
        InputError: unknown words, keys or values; or nothing fits: names the tier, the bytes wanted and there, and
            changes that would fit.
    """
    flags, words = split_flags(argv, FLAGS)
    words = [*environment_words(os.environ), *words]
    own = read_keys([word for word in words if word.partition("=")[0] in OWN_KEYS], OWN_KEYS)
    words = [word for word in words if word.partition("=")[0] not in OWN_KEYS]
    asked = [key for key in ("sweep", "compare") if key in own] + [flag for flag in (MAX_LEN,) if flag in flags]
    _check_question(asked, own)
    as_json = "--json" in flags
    try:
        if asked:
            text = many_plans(asked[0], words, own, as_json=as_json)
        else:
            text = one_plan(words, {key: str(value) for key, value in own.items()}, as_json=as_json)
    except Refused as refused:
        if as_json:
            print(json.dumps(refused.answer))
        raise
    print(text)
    return 0


def one_plan(words: Sequence[str], files: Mapping[str, str], *, as_json: bool) -> str:
    """The plan of these words, for people or for programs; writes the files of its timeline.

    Raises:
        InputError: see run.
    """
    config, request = ask(words)
    if config.parallel.pipeline > 1:
        found = plan_pipeline(config, request)
        write_timeline(found.timeline, f"{request.model.name}, {request.seq_len} tokens", files)
        return json.dumps(found.to_json()) if as_json else found.explain()
    plans, endurance = solve_plans(request), config.tiers.ssd.endurance
    if files:
        plan = plans[request.seq_len]
        title = f"{request.model.name}, {request.seq_len} tokens, plan {plan.name}"
        write_timeline(step_timeline(plan, request, config), title, files)
    if as_json:
        return json.dumps(plans_to_json(plans, request, endurance=endurance))
    return explain_plans(plans, request, endurance=endurance)


def ask(words: Sequence[str]) -> tuple[RunConfig, PlanRequest]:
    """The configuration of these words, and the planner's question.

    Raises:
        InputError: see run.
    """
    loaded = load_run_config(words, environ={})
    config = loaded.config
    for warning in loaded.warnings:
        print(f"headrace plan: warning: {warning}", file=sys.stderr)
    vocab_size = config.model.vocab_size or expected_vocab_size(config.data)
    if config.hardware.device_class is DeviceClass.cpu:
        return config, ask_planner(config, Path(config.run.dir or "."), vocab_size)
    return config, request_from_config(config, vocab_size)  # for a machine that is elsewhere


def _check_question(asked: Sequence[str], own: Mapping[str, object]) -> None:
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)}: ask for one of them at a time")
    for key, wanted in GOES_WITH.items():
        if key in own and wanted not in asked:
            raise InputError(f"{key}={own[key]}: goes with {wanted} only; leave it out, or ask for {wanted}")
    if asked and (drawn := sorted(FILE_KEYS.keys() & own.keys())):
        raise InputError(f"{drawn[0]}={own[drawn[0]]}: of one plan; leave {asked[0]} out, or this key")


def many_plans(question: str, words: Sequence[str], own: Mapping[str, Any], *, as_json: bool) -> str:
    """The answer to sweep, compare or --max-len, for people or for programs.

    Raises:
        InputError: see run.
    """
    if question == "compare":
        sides = []
        for name, its_words in many.compared_words(own["compare"], words).items():
            config, request = ask(its_words)
            many.one_rank(config, "compare")
            sides.append(many.Side(name, config, request))
        found = many.comparison(sides)
        return json.dumps(found) if as_json else many.comparison_text(sides, found)
    if question == MAX_LEN:
        unit = own.get("unit", UNIT)
        if unit < 1:
            raise InputError(f"unit={unit}: at least one token")
        config, request = ask(words)
        many.one_rank(config, MAX_LEN)
        longest_row = longest(request, unit)
        return json.dumps(many.longest_json(longest_row)) if as_json else many.longest_text(longest_row)
    from headrace.platform.report.plan_sweep import check_picture, draw_sweep

    lengths, picture = many.read_lengths(own["sweep"]), Path(own.get("picture", PICTURE)).expanduser()
    check_picture(picture)
    config, request = ask(words)
    answers = many.sweep_answers(config, request, lengths)
    draw_sweep(answers, many.sweep_title(request), picture)
    if as_json:
        return json.dumps({"sweep": answers, "picture": str(picture)})
    return many.sweep_text(answers, request, picture)


def write_timeline(timeline: StepTimeline, title: str, files: Mapping[str, str]) -> None:
    """Write the files that were asked for.

    Raises:
        InputError: one cannot be written.
    """
    from headrace.platform.report.step_timeline import draw_timeline, write_trace

    if "timeline" in files:
        draw_timeline(timeline, f"{title}, {timeline.num_ranks} ranks", Path(files["timeline"]).expanduser())
    if "trace" in files:
        write_trace(timeline, Path(files["trace"]).expanduser())


def ask_planner(config: RunConfig, run_dir: Path, vocab_size: int) -> PlanRequest:
    """The planner's question with what this machine really has.

    Raises:
        InputError: a budget above it, or a folder of tiers.ssd.path that cannot be used.
    """
    if config.tiers.ssd.budget_gib != 0:
        check_ssd_path(config.tiers.ssd.folders)
    book, grows = RateBook(), config.tiers.host.memory_grows
    hardware = fill_in(config.hardware, ssd_folders(config, run_dir), book=book, memory_grows=grows)
    if warning := book.warning():
        print(f"headrace: warning: {warning}", file=sys.stderr)
    config = replace(config, hardware=hardware)
    if problems := list(budgets_within_hardware(config)):
        raise InputError("\n".join(problems))
    return replace(request_from_config(config, vocab_size), rates_note=book.note())


def ssd_folders(config: RunConfig, run_dir: Path) -> tuple[Path, ...]:
    """Where slab files go, one folder per drive."""
    return tuple(Path(f).expanduser().absolute() for f in config.tiers.ssd.folders) or (run_dir / "tiers",)


def expected_vocab_size(data: DataConfig) -> int:
    """Tokens of the data: of the prepared folder, of the tokenizer, or of the BPE that would be trained.

    Raises:
        InputError: what is named is not there or not whole.
    """
    if data.prepared is not None:
        return open_prepared(data.prepared, seq_len=data.seq_len, buckets=data.buckets).vocab_size
    if data.tokenizer is not None:
        from headrace.workers.data.tokenizer_files import read_tokenizer_files
        from headrace.workers.data.tokenizing import RowTokenizer

        return RowTokenizer(read_tokenizer_files(data.tokenizer)).vocab_size
    return data.bpe_vocab_size
