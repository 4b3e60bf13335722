"""The longest row whose step fits into a budget of live tensors: our plans, and transformers with its checkpointing.

Live tensors are all storages of a step but parameters and gradients (tests/helpers/live_bytes.py), the same for all
cases. Lengths are multiples of `stride`: doubled until one does not fit, then bisected between the last two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.bench.step import MIB, live_peak, make_case, planned_step
from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import Cuts
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import dense_skeleton

DESCRIPTION = "longest row that fits into equal bytes of live tensors, beside transformers with checkpointing"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    "vocab_size": 4096,
    "budget_mib": 64,
    "stride": 256,
    "most": 16384,
    "chunk_size": 256,
    "token_tile": 512,
}
CHECKPOINTING = "transformers_checkpointing"
# Preset and head groups of every case of ours.
OURS = {
    "offload_host": ("offload_host", 1),
    "offload_host_2_head_groups": ("offload_host", 2),
    "offload_ssd": ("offload_ssd", 1),
    "chunk_host": ("chunk_host", 1),
}
AT_LEAST = 3


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per case, transformers first.

    Args:
        options: model and vocab_size as of `step`; budget_mib; stride and most in tokens; chunk_size and token_tile of
            our plans.

    Raises:
        InputError: an unknown shape, or a stride or budget below 1.
    """
    for key in ("budget_mib", "stride", "chunk_size", "token_tile"):
        if int(options[key]) < 1:
            raise InputError(f"{key}={options[key]}: at least 1 is wanted")
    model = model_shape(str(options["model"]))
    model = replace(model, vocab_size=model.vocab_size or int(options["vocab_size"]))
    decoder = Decoder(model)
    decoder.init_weights(0)
    stride, most = int(options["stride"]), int(options["most"])
    theirs = 0
    for name in (CHECKPOINTING, *OURS):
        peaks: dict[int, int] = {}
        found = longest(
            partial(measured, name, decoder, options, peaks),
            int(options["budget_mib"]) * MIB,
            stride=stride,
            most=most,
        )
        numbers: dict[str, float] = {"longest_tokens": found, "num_measured": len(peaks), "is_most": int(found == most)}
        if found:
            numbers["live_peak_mib"] = peaks[found] / MIB
        target = None
        if name == CHECKPOINTING:
            theirs = found
        elif theirs:
            ratio = numbers[f"longest_over_{CHECKPOINTING}"] = found / theirs
            target = Target(f"at least {AT_LEAST} x the tokens of {CHECKPOINTING}", ratio >= AT_LEAST)
        yield Row(name, numbers, dict(options), target)


def longest(peak_of: Callable[[int], int], budget_bytes: int, *, stride: int, most: int) -> int:
    """The largest multiple of `stride`, up to `most`, whose peak is within the budget; 0 where none is."""
    low, last = 0, most // stride
    high = last + 1
    while low < last and high > last:
        probe = min(max(1, 2 * low), last)
        if peak_of(probe * stride) <= budget_bytes:
            low = probe
        else:
            high = probe
    while low < last and high - low > 1:
        middle = (low + high) // 2
        if peak_of(middle * stride) <= budget_bytes:
            low = middle
        else:
            high = middle
    return low * stride


def measured(
    name: str, decoder: Decoder, options: Mapping[str, OptionValue], peaks: dict[int, int], num_tokens: int
) -> int:
    """Most bytes of live tensors in a step of a row of so many tokens; `peaks` keeps it."""
    model = decoder.config
    tokens = torch.randint(0, model.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(0))
    tile = int(options["token_tile"])
    with ExitStack() as closing:
        if name == CHECKPOINTING:
            step, params = make_case(name, model, decoder, tokens, tile, closing)
        else:
            preset, head_groups = OURS[name]
            plan = preset_plan(
                preset,
                [dense_skeleton(model)] * model.num_layers,
                cuts=Cuts(tile, head_groups=head_groups),
                choices=Choices(num_tokens, chunk_size=min(int(options["chunk_size"]), num_tokens)),
            )
            (step, _), params = planned_step(plan, decoder, tokens, closing), list(decoder.parameters())
        for param in params:
            param.grad = torch.zeros_like(param)
        peaks[num_tokens] = live_peak(step, [*params, *(p.grad for p in params if p.grad is not None), tokens])
    return peaks[num_tokens]
