"""`headrace plan`: the memory plan of a run, before the run. No torch, no Ray, under two seconds."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headrace.platform.cli.plan_pipeline import plan_pipeline
from headrace.platform.config.load import load_run_config
from headrace.platform.config.rules_memory import budgets_within_hardware
from headrace.platform.config.schema import RunConfig
from headrace.platform.config.words import environment_words
from headrace.platform.keys import read_keys, split_flags
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.lengths import explain_plans, plans_to_json, solve_plans
from headrace.platform.planning.machine import check_ssd_path, fill_in
from headrace.platform.planning.refuse import Refused
from headrace.platform.planning.request import PlanRequest, request_from_config
from headrace.platform.planning.simulate.step import StepTimeline, step_timeline
from headrace.storage.core.errors import InputError
from headrace.workers.data.config import DataConfig
from headrace.workers.data.opening import open_prepared
from headrace.workers.telemetry.rate_book import RateBook

USAGE = """\
usage: headrace plan [conf=EXPERIMENT|FILE.yaml] [GROUP=CHOICE ...] [KEY=VALUE ...] [timeline=FILE.png]
                     [trace=FILE.json] [--json]

Prints where every tensor is stored, the cost, the limiting budget and what would help. Takes the words of
`headrace train`.
  headrace plan experiment=qwen2_5_7b_256k_1xh200
  headrace plan model=llama3_8b hardware=h100_80g data.seq_len=131072 memory=auto tiers.host.budget_gib=200

  timeline=FILE.png   draw a simulated step: compute, copies, drives and network over time
  trace=FILE.json     write it as a Chrome trace (chrome://tracing, Perfetto)
  --json              one JSON object on one line, last on stdout
If no plan fits: exit code 2 and three changes that would make it fit; with --json also on stdout.
"""
FILE_KEYS = {"timeline": str, "trace": str}
FLAGS = ("--json", "-h", "--help")


def run(argv: Sequence[str]) -> int:
    """Run `headrace plan ...`.

    Args:
        argv: words after `plan`.

    Returns:
        0.

    Raises:
        InputError: unknown words, keys or values; or nothing fits: names the tier, the bytes wanted and there, and
            changes that would fit.
    """
    flags, words = split_flags(argv, FLAGS)
    if flags & {"-h", "--help"}:
        print(USAGE, end="")
        return 0
    words = [*environment_words(os.environ), *words]
    files = read_keys([word for word in words if word.partition("=")[0] in FILE_KEYS], FILE_KEYS)
    loaded = load_run_config([word for word in words if word.partition("=")[0] not in FILE_KEYS], environ={})
    config = loaded.config
    for warning in loaded.warnings:
        print(f"headrace plan: warning: {warning}", file=sys.stderr)
    vocab_size = config.model.vocab_size or expected_vocab_size(config.data)
    if config.hardware.device_class is DeviceClass.cpu:
        request = ask_planner(config, Path(config.run.dir or "."), vocab_size)
    else:
        request = request_from_config(config, vocab_size)  # for a machine that is elsewhere
    if config.parallel.pipeline > 1:
        found = plan_pipeline(config, request)
        write_timeline(found.timeline, f"{request.model.name}, {request.seq_len} tokens", files)
        print(json.dumps(found.to_json()) if "--json" in flags else found.explain())
        return 0
    try:
        plans, endurance = solve_plans(request), config.tiers.ssd.endurance
    except Refused as refused:
        if "--json" in flags:
            print(json.dumps(refused.answer))
        raise
    if files:
        plan = plans[request.seq_len]
        title = f"{request.model.name}, {request.seq_len} tokens, plan {plan.name}"
        write_timeline(step_timeline(plan, request, config), title, files)
    if "--json" in flags:
        print(json.dumps(plans_to_json(plans, request, endurance=endurance)))
    else:
        print(explain_plans(plans, request, endurance=endurance))
    return 0


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
