"""Forward and backward of one micro-batch: our presets, transformers and torch's own tools, in alternating rounds.

Every case has the same weights and tokens, in one process. Seconds are medians over the rounds. Peaks are of a step
without parameters and gradients, in passes that are not timed:

    live_peak_mib        all live tensors (tests/helpers/live_bytes.py); a compiled step's are not seen there
    allocated_peak_mib   what torch's allocator gave out, also inside of operators; seen of every case
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.profiler import ProfilerActivity, profile

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.helpers.live_bytes import LiveBytes
from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.storage.core.ledger import PAGE_BYTES
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.chunk_plan import KvShape, pass_bytes
from headrace.workers.memory.chunk_record import PassRecords
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, Sweep
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.schedule import moved_bytes
from headrace.workers.memory.sweeps import Sweeping, apply_plan, open_sweep
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import hf_name
from headrace.workers.model.hf_config import config_to_hf
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.verify.ours import open_tiers

DESCRIPTION = "forward and backward under every memory preset, beside transformers and torch's own tools"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    "vocab_size": 4096,
    "num_layers": 0,
    "seq_len": 4096,
    "token_tile": 512,
    "rounds": 3,
    "cases": "",
}
MIB = 1 << 20
LOSS_TILE = 1024
PRESETS = ("keep", "recompute", "offload_host", "offload_ssd", "alst", "memo", "ssdtrain")
ATTENTION_HELD = "memo_alpha_0"
# Our decoder without a plan: autograd keeps what it saves.
PLAIN = "plain"
# torch.compile that recomputes until the activations take this share of what they took. (transformers' own offload of
# checkpoints pins host memory, which torch does not do without an accelerator: `gpu_headline` has it.)
BUDGETS = {f"transformers_compiled_{percent}": percent / 100 for percent in (25, 50, 75)}
THEIRS = (
    "transformers",
    "transformers_checkpointing",
    "transformers_save_on_cpu",
    *BUDGETS,
)
AT_EQUAL_PEAK = 1.02
# What one case must keep of another's seconds.
TARGETS = {
    "keep": ("transformers", 1.02),
    ATTENTION_HELD: ("keep", 1.12),
    "recompute": ("transformers_checkpointing", 1.0),
    "offload_host": ("keep", 1.12),
}
# Host time that a plan may add to a block in each direction. It shows where blocks are many and tiny.
OVERHEAD_US = 150
Step = Callable[[], Any]


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per case.

    Args:
        options: model: a shape of conf/model; vocab_size where the shape follows its data; num_layers: 0 for the
            shape's own; seq_len and token_tile in tokens; rounds; cases: names with commas, empty for all.

    Raises:
        InputError: an unknown case or shape, or no round.
    """
    rounds, known = int(options["rounds"]), (*PRESETS, ATTENTION_HELD, PLAIN, *THEIRS)
    wanted = [word for word in str(options["cases"]).split(",") if word] or list(known)
    if stray := set(wanted) - set(known):
        raise InputError(f"cases={','.join(sorted(stray))}: choose of {', '.join(known)}")
    if rounds < 1:
        raise InputError(f"rounds={rounds}: at least one round is wanted")
    model = model_shape(str(options["model"]))
    model = replace(
        model,
        vocab_size=model.vocab_size or int(options["vocab_size"]),
        num_layers=int(options["num_layers"]) or model.num_layers,
    )
    tokens = torch.randint(
        0, model.vocab_size, (1, int(options["seq_len"])), generator=torch.Generator().manual_seed(0)
    )
    decoder = Decoder(model)
    decoder.init_weights(0)
    peaks: dict[str, tuple[int, int | None]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    # Compiled once, not in every round.
    compiled = {name: make_case(name, model, decoder, tokens, 0, ExitStack()) for name in wanted if name in BUDGETS}
    for number in range(rounds + 1):
        order = wanted if number % 2 else wanted[::-1]
        for name in order:
            with ExitStack() as closing:
                tile = int(options["token_tile"])
                step, params = compiled.get(name) or make_case(name, model, decoder, tokens, tile, closing)
                if number == 0:
                    step()  # gradients are there and caches are warm
                    there = [*params, *(p.grad for p in params if p.grad is not None), tokens]
                    peaks[name] = allocated_peak(step), None if name in BUDGETS else live_peak(step, there)
                else:
                    seconds[name].append(timed(step))
    yield from rows(wanted, peaks, seconds, {**options, "num_layers": model.num_layers})


def rows(
    wanted: list[str],
    peaks: Mapping[str, tuple[int, int | None]],
    seconds: Mapping[str, list[float]],
    options: Mapping[str, OptionValue],
) -> Iterator[Row]:
    """One row per case, with its target where what it is compared with was run too.

    Theirs are compared with the fastest of ours whose peak is not above their own.

    Args:
        peaks: bytes allocated, and of live tensors where they are seen.
    """
    for name in wanted:
        step_s, (allocated, live) = median(seconds[name]), peaks[name]
        numbers: dict[str, float] = {"step_s_median": step_s, "allocated_peak_mib": allocated / MIB}
        if live is not None:
            numbers["live_peak_mib"] = live / MIB
        target = None
        ours = [
            median(seconds[case]) for case in wanted if case not in (PLAIN, *THEIRS) and peaks[case][0] <= allocated
        ]
        if name in TARGETS and TARGETS[name][0] in seconds:
            other, limit = TARGETS[name]
            ratio = numbers[f"seconds_over_{other}"] = step_s / median(seconds[other])
            target = Target(f"at most {limit} x the seconds of {other}", ratio <= limit)
        elif name == PLAIN and "keep" in seconds:
            added = (median(seconds["keep"]) - step_s) * 1e6 / (2 * int(options["num_layers"]))
            numbers["keep_adds_us_per_block_and_direction"] = added
            target = Target(f"keep adds at most {OVERHEAD_US} us to a block in each direction", added <= OVERHEAD_US)
        elif name in THEIRS and ours:
            ratio = numbers["ours_over_seconds"] = min(ours) / step_s
            target = Target(f"ours at most {AT_EQUAL_PEAK} x its seconds at its peak or below", ratio <= AT_EQUAL_PEAK)
        yield Row(name, numbers, {**options, "num_threads": torch.get_num_threads()}, target)


def timed(step: Step) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def live_peak(step: Step, apart: list[torch.Tensor]) -> int:
    """Most bytes of live tensors at once during a step."""
    with LiveBytes(apart) as live:
        step()
    return live.peak


def allocated_peak(step: Step) -> int:
    """Most bytes that torch's allocator had given out at once during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results = seen.profiler.kineto_results
    moves = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate((num_bytes for _, num_bytes in moves), initial=0))


def make_case(
    name: str, model: ModelConfig, decoder: Decoder, tokens: torch.Tensor, token_tile: int, closing: ExitStack
) -> tuple[Step, list[torch.Tensor]]:
    """The step of a case, and its parameters. What it opens is closed by `closing`."""
    if name == PLAIN:
        batch = batch_of(tokens)

        def plain() -> None:
            loss = decoder(tokens, batch.targets, packing=batch.packing, loss_tile=LOSS_TILE)
            (loss / tokens.numel()).backward()

        return plain, list(decoder.parameters())
    if name in THEIRS:
        net = hugging_face(model, decoder)
        if name == "transformers_checkpointing":
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        on_cpu = name == "transformers_save_on_cpu"
        called = torch.compile(net) if name in BUDGETS else net

        def step() -> None:
            # The budget is read when the first call compiles, and again where a call must compile anew.
            budget = functorch_config.patch(activation_memory_budget=BUDGETS.get(name, 1.0))
            with budget, torch.autograd.graph.save_on_cpu() if on_cpu else nullcontext():
                called(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

        return step, list(net.parameters())
    plan = plan_of(name, model, tokens.shape[1], token_tile)
    return planned_step(plan, decoder, tokens, closing)[0], list(decoder.parameters())


def planned_step(
    plan: MemoryPlan, decoder: Decoder, tokens: torch.Tensor, closing: ExitStack
) -> tuple[Step, TierStack | None]:
    """The step of our decoder under a plan, and its tiers, of just the size that it needs; None: nothing moves."""
    stack = stack_for(plan, decoder.config, tokens, closing)
    sweep, batch = sweep_of(plan, decoder, stack, closing), batch_of(tokens)
    return lambda: sweep.forward_backward(batch, tokens.numel(), step=0, micro_batch=0), stack


def stack_for(
    plan: MemoryPlan, model: ModelConfig, tokens: torch.Tensor, closing: ExitStack, *, gradient_copies: int = 1
) -> TierStack | None:
    """Tiers of just the size that a plan needs, None where nothing moves; `gradient_copies`: see pass_bytes."""
    seq_len, skeletons = tokens.shape[1], [dense_skeleton(model)] * model.num_layers
    if plan.sweep is Sweep.by_chunk:
        shape = KvShape.of(skeletons, batch_size=1, num_tokens=seq_len, itemsize=4, window=model.sliding_window)
        wanted = pass_bytes(plan, skeletons, shape, gradient_copies=gradient_copies).slots
    else:
        wanted = moved_bytes(plan, skeletons, batch_size=1, num_tokens=seq_len, itemsize=4, round_to=PAGE_BYTES)
    # A row of one chunk moves nothing, and its plan asks for a tier all the same.
    wanted |= {tier: max(wanted[tier], PAGE_BYTES) for tier in plan.media}
    return closing.enter_context(open_tiers(wanted, tokens.device, TransferLog()))


def sweep_of(
    plan: MemoryPlan, decoder: Decoder, stack: TierStack | None, closing: ExitStack, records: PassRecords | None = None
) -> Sweeping:
    """The sweep of a plan over our decoder."""
    handle = apply_plan(decoder, plan, stack, meter=None, bucket_plans=None)
    sweep = open_sweep(decoder, handle, None, loss_tile=LOSS_TILE, itemsize=4, records=records)
    closing.callback(sweep.close)
    return sweep


def batch_of(tokens: torch.Tensor) -> TokenBatch:
    """One document, (1, T) tokens; every token's target is the next one."""
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), dim=1)
    return TokenBatch(tokens, targets, Packing.of_lengths([tokens.shape[1]]))


def plan_of(name: str, model: ModelConfig, seq_len: int, token_tile: int) -> MemoryPlan:
    """The plan of a case: memo puts half of the tokens on the host and a quarter on the SSD."""
    skeleton, cuts = dense_skeleton(model), Cuts(token_tile)
    if name == ATTENTION_HELD:
        row = LayerPlan.of(x=Residence.host, out=Residence.host, lse=Residence.host)
        return MemoryPlan(name, (*(row,) * (model.num_layers - 1), row.on_device()), cuts=cuts)
    choices = Choices(seq_len, host_fraction=0.5, ssd_fraction=0.25)
    return preset_plan(name, [skeleton] * model.num_layers, cuts=cuts, choices=choices)


def hugging_face(model: ModelConfig, decoder: Decoder) -> Any:
    """The same decoder in transformers, with the same weights, in training mode without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_to_hf(model, "float32")
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    net: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    weights = {hf_name(name): param.detach() for name, param in decoder.named_parameters()}
    net.load_state_dict(weights, strict=not model.tie_embeddings)
    return net.train()
