"""What the sweep by chunk costs: its second forward, keys and values away from the device, records of a half-done step.

All cases have the same weights, tokens and token tiles, in one process, in alternating rounds; seconds are medians of
forward and backward of one row. What a tier costs is compared with what its bandwidth explains:

    explained_s = seconds of `chunk` + bytes stored / store rate + bytes loaded / load rate

The rates are measured in the same rounds, with blobs of one KV block through the same tier and nothing beside them. A
CPU copies with the cores that compute, so nothing of a copy is free; on CUDA copies hide, and the sum is a bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.bench.step import batch_of, stack_for, sweep_of, timed
from headrace.platform.keys import whole_numbers
from headrace.storage.core.errors import InputError
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.ledger import round_up
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.workers.job import RankContext
from headrace.workers.memory.plan import Cuts, MemoryPlan
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.parallel.process_group import process_group
from headrace.workers.train.step_records import StepRecords

DESCRIPTION = "the sweep by chunk beside that by layer; what tiers and records of a half-done step cost it"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    "vocab_size": 4096,
    "seq_len": 16384,
    "chunk_size": 2048,
    "token_tile": 512,
    "rounds": 3,
    "record_every": "1,4",
}
BY_LAYER, IN_HBM, ON_HOST = "keep", "chunk", "chunk_host"
OVER_LAYER, OVER_EXPLAINED = 1.45, 1.03
AWAY = {ON_HOST: Medium.host, "chunk_ssd": Medium.ssd}
# Blobs of one KV block with which a tier's rates are measured, where it has room for so many.
NUM_BLOBS = 8


@dataclass
class Found:
    """What the rounds have measured of one case.

    Args:
        moved: bytes stored and loaded by one step.
        copies_s: seconds that these bytes take alone.
    """

    seconds: list[float] = field(default_factory=list)
    copies_s: list[float] = field(default_factory=list)
    moved: tuple[int, int] = (0, 0)


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per case: by layer, by chunk in every place, and with a record after every so many chunks.

    Args:
        options: model and vocab_size as of `step`; seq_len, chunk_size and token_tile in tokens; rounds; record_every:
            numbers of chunks, with commas.

    Raises:
        InputError: an unknown shape, no round, or a record after no chunk.
    """
    every = whole_numbers("record_every", str(options["record_every"]))
    for key, value in {"rounds": int(options["rounds"]), "record_every": min(every, default=1)}.items():
        if value < 1:
            raise InputError(f"{key}={value}: at least 1 is wanted")
    model = model_shape(str(options["model"]))
    model = replace(model, vocab_size=model.vocab_size or int(options["vocab_size"]))
    decoder = Decoder(model)
    decoder.init_weights(0)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (1, int(options["seq_len"])), generator=draw)
    names = {BY_LAYER: 0, IN_HBM: 0, **dict.fromkeys(AWAY, 0), **{f"{ON_HOST}_record_every_{n}": n for n in every}}
    found = {name: Found() for name in names}
    with process_group(RankContext(), tokens.device):  # records are agreed on by all ranks
        for number in range(int(options["rounds"]) + 1):  # the first one warms caches, and is not counted
            for name in list(names) if number % 2 else reversed(list(names)):
                _measure(found[name], name.partition("_record")[0], names[name], decoder, tokens, options)
                if number == 0:
                    found[name].seconds.clear()
                    found[name].copies_s.clear()
    yield from _rows(found, len(tokens[0]), options)


def _rows(found: Mapping[str, Found], num_tokens: int, options: Mapping[str, OptionValue]) -> Iterator[Row]:
    middle = {name: median(each.seconds) for name, each in found.items()}
    for name, each in found.items():
        step_s = middle[name]
        numbers: dict[str, float] = {"step_s_median": step_s, "us_per_token": 1e6 * step_s / num_tokens}
        target = None
        if name == IN_HBM:
            ratio = numbers["over_by_layer"] = step_s / middle[BY_LAYER]
            target = Target(f"at most {OVER_LAYER} x the seconds by layer", ratio <= OVER_LAYER)
        elif name in AWAY:
            explained = numbers["explained_s"] = middle[IN_HBM] + median(each.copies_s)
            numbers |= dict(zip(("stored_bytes", "loaded_bytes"), map(float, each.moved), strict=True))
            numbers["over_chunk"] = step_s / middle[IN_HBM]
            ratio = numbers["over_explained"] = step_s / explained
            target = Target(f"at most {OVER_EXPLAINED} x what the bandwidth explains", ratio <= OVER_EXPLAINED)
        elif "_record_" in name:
            numbers["over_no_record"] = step_s / middle[ON_HOST]
        yield Row(name, numbers, {**options, "num_threads": torch.get_num_threads()}, target)


def _measure(
    found: Found,
    preset: str,
    record_every: int,
    decoder: Decoder,
    tokens: torch.Tensor,
    options: Mapping[str, OptionValue],
) -> None:
    """Time one step of a case, and what it moves."""
    model = decoder.config
    plan = _plan(preset, model, tokens.shape[1], options)
    with ExitStack() as closing:
        stack = stack_for(plan, model, tokens, closing, gradient_copies=2 if record_every else 1)
        records, batch = None, batch_of(tokens)
        if record_every:
            folder = Path(closing.enter_context(TemporaryDirectory()))
            records = StepRecords(folder, record_every, {}, stack)
            records.follow(decoder, _refuse, lambda: None)
            records.begin(0, [batch])
        sweep = sweep_of(plan, decoder, stack, closing, records)
        found.seconds.append(timed(lambda: sweep.forward_backward(batch, tokens.numel(), step=0, micro_batch=0)))
        if records is not None:
            records.end()
        if preset in AWAY:
            assert stack is not None
            stats = stack.stats()[AWAY[preset]]
            found.moved = stats.stored_bytes, stats.loaded_bytes
            assert plan.cuts.kv_block is not None
            block = 2 * min(plan.cuts.kv_block, tokens.shape[1]) * model.num_kv_heads * model.head_size * 4
            rates = _rates(stack, AWAY[preset], block)
            found.copies_s.append(sum(amount / rate for amount, rate in zip(found.moved, rates, strict=True)))


def _plan(preset: str, model: ModelConfig, seq_len: int, options: Mapping[str, OptionValue]) -> MemoryPlan:
    choices = Choices(seq_len, chunk_size=min(int(options["chunk_size"]), seq_len))
    skeletons, cuts = [dense_skeleton(model)] * model.num_layers, Cuts(int(options["token_tile"]))
    return preset_plan(preset, skeletons, cuts=cuts, choices=choices)


def _rates(stack: TierStack, medium: Medium, num_bytes: int) -> tuple[float, float]:
    """Bytes per second to and from a tier, in blobs of this size."""
    source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
    num_blobs = max(1, min(NUM_BLOBS, stack.stats()[medium].capacity_bytes // round_up(num_bytes)))
    keys = [BlobKey("rates", 0, f"blob{n}", 0, 1, 0) for n in range(num_blobs)]
    begin = time.perf_counter()
    for key in keys:
        stack.prepare_store(key, source, medium)
    for key in keys:
        stack.complete_store(key)
    stored = time.perf_counter()
    for key in keys:
        stack.prepare_load(key, into=target)
        stack.complete_load(key)
    loaded = time.perf_counter()
    for key in keys:
        stack.discard(key)
    return num_blobs * num_bytes / (stored - begin), num_blobs * num_bytes / (loaded - stored)


def _refuse(kind: str, text: str) -> None:
    raise RuntimeError(f"{kind}: {text}")
