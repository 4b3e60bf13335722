"""The planner against what its plans really take: peaks, bytes moved and seconds of twelve configurations.

In a configuration the solved plan, the presets that fit and are predicted to be fastest, the greedy plan and full
recompute run in turn. Seconds are those of the shortest of the rounds, because other programs only add to them. The
compute rate of the profile comes from a reference that runs in the same rounds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.bench.step import live_peak, planned_step, timed
from headrace.platform.keys import pick, whole_numbers
from headrace.platform.planning import priced
from headrace.platform.planning.greedy import greedy
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.machine import fill_in
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan, problem_of
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import MemoryPlan, Sweep
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.telemetry.rate_book import RateBook

DESCRIPTION = "predicted against measured: peaks, bytes and seconds of solved plans, beside presets and recompute"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    "vocab_size": 4096,
    "lengths": "512,1024,2048",
    "settings": "",
    "rounds": 5,
    "most_rivals": 2,
    # On a machine with other work, threads that wait for each other measure that work.
    "num_threads": 1,
}
TIERS = (Medium.host, Medium.ssd)
CLOSE_PCT, CLOSE_STEP_PCT = 2.0, 15.0
# Two plans whose steps differ by less are equally fast, as far as a shared machine can tell.
NOISE = 1.02
GAIN = 0.95
LEAN = "recompute"
# A step of the plan keep at this length gives the profile's compute rate.
REFERENCE, REFERENCE_TOKENS = "reference", 512
RIVALS = [
    preset
    for preset in MemoryPreset
    if preset not in (MemoryPreset.auto, MemoryPreset.checkpoint) and not preset.is_lossy
]


@dataclass(frozen=True)
class Setting:
    """A configuration at one length.

    Args:
        preset: the plan whose predictions are checked; auto is solved within the shares.
        device_share: of what lies between the device's peaks of offload_host and keep, or chunk_host and chunk; with
            another preset the budgets are what its plan wants.
        host_share: of the peak of keep; ssd: whether there is a drive.
        sweep: that auto must take; None: the faster one.
        num_chunks: of a row, for the sweep by chunk.
    """

    preset: MemoryPreset = MemoryPreset.auto
    device_share: float = 0.0
    host_share: float = 0.0
    ssd: bool = False
    sweep: Sweep | None = None
    num_chunks: int | None = None


# Of the first, third, ... length, and of those between.
SETTINGS: Sequence[Mapping[str, Setting]] = (
    {
        "roomy": Setting(device_share=0.6, host_share=0.1),
        "tight": Setting(device_share=0.1, host_share=0.05, ssd=True),
        "memo": Setting(MemoryPreset.memo),
        "by_chunk": Setting(device_share=0.4, host_share=0.5, sweep=Sweep.by_chunk, num_chunks=4),
    },
    {
        "device_only": Setting(device_share=0.3),
        "host": Setting(device_share=0.0, host_share=0.5),
        "ssdtrain": Setting(MemoryPreset.ssdtrain),
        "chunk_ssd": Setting(MemoryPreset.chunk_ssd, num_chunks=4),
    },
)


class Measured(NamedTuple):
    """Of one step: peak of every tier, and bytes stored to and loaded from the tiers."""

    peaks: dict[Medium, int]
    stored: dict[Medium, int]
    loaded: dict[Medium, int]


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """A row per configuration, then one of the median error of the step's seconds.

    Raises:
        InputError: an unknown shape, no length, or no round.
    """
    lengths, rounds = whole_numbers("lengths", str(options["lengths"])), int(options["rounds"])
    if rounds < 1 or not lengths or min(lengths) < 16:
        raise InputError(f"rounds={rounds} lengths={options['lengths']}: at least one round and 16 tokens are wanted")
    model = model_shape(str(options["model"]))
    decoder = ready_decoder(replace(model, vocab_size=model.vocab_size or int(options["vocab_size"])))
    before = torch.get_num_threads()
    torch.set_num_threads(int(options["num_threads"]))
    try:
        yield from rows(decoder, lengths, options)
    finally:
        torch.set_num_threads(before)


def rows(decoder: Decoder, lengths: Sequence[int], options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """As run."""
    first_s = min(in_turn({}, decoder, tokens_of(decoder.config, 1), 2)[REFERENCE])
    profile = calibrated(reference_request(decoder.config, measured_profile()), first_s).profile
    known = {name for settings in SETTINGS for name in settings}
    chosen = [word for word in str(options["settings"]).split(",") if word]
    for word in chosen:
        pick("settings", word, sorted(known))
    errors: list[float] = []
    for number, seq_len in enumerate(lengths):
        for name, setting in SETTINGS[number % 2].items():
            if chosen and name not in chosen:
                continue
            request = request_of(setting, decoder.config, seq_len, profile)
            row = check(f"{seq_len} tokens, {name}", request, decoder, options)
            errors += [
                abs(error) for key, error in row.numbers.items() if key == "step_error_pct" and error is not None
            ]
            yield row
    if not errors:
        return
    error_pct = median(errors)
    target = Target(f"median step time within {CLOSE_STEP_PCT:.0f} %", error_pct <= CLOSE_STEP_PCT)
    yield Row("all", {"step_error_median_pct": error_pct, "num_configurations": len(errors)}, {}, target)


def ready_decoder(model: ModelConfig) -> Decoder:
    """A decoder that has run: gradients and tables are there."""
    decoder = Decoder(model)
    decoder.init_weights(0)
    for param in decoder.parameters():
        param.grad = torch.zeros_like(param)
    with torch.no_grad():
        decoder(tokens_of(model, 1))
    return decoder


def tokens_of(model: ModelConfig, seq_len: int) -> torch.Tensor:
    """[1, seq_len] random tokens, the same in every call."""
    return torch.randint(0, model.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(0))


def measured_profile() -> HardwareProfile:
    """This machine, with the rates that `headrace plan` measures."""
    bare = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured, compute_efficiency=1.0)
    return fill_in(bare, [Path.cwd()], book=RateBook())


def request_of(setting: Setting, model: ModelConfig, seq_len: int, profile: HardwareProfile) -> PlanRequest:
    """What the planner is asked in a configuration."""
    chunk = None if setting.num_chunks is None else -(-seq_len // setting.num_chunks)
    free = PlanRequest(
        model=model, seq_len=seq_len, profile=profile, chunk_size=chunk, sweep=setting.sweep, preset=setting.preset
    )
    if setting.preset is not MemoryPreset.auto:
        wanted = priced.wanted_bytes(asked_plan(free), free)
        return with_budgets(free, wanted)
    ends = (MemoryPreset.keep, MemoryPreset.offload_host)
    if setting.sweep is Sweep.by_chunk:
        ends = (MemoryPreset.chunk, MemoryPreset.chunk_host)
    questions = (replace(free, preset=preset) for preset in ends)
    kept, lean = (priced.wanted_bytes(asked_plan(own), own)[Medium.hbm] for own in questions)
    device = lean + int(setting.device_share * (kept - lean))
    return with_budgets(
        free, {Medium.hbm: device, Medium.host: int(setting.host_share * kept), Medium.ssd: kept if setting.ssd else 0}
    )


def with_budgets(request: PlanRequest, budgets: Mapping[Medium, int]) -> PlanRequest:
    """The request with so many bytes in every tier."""
    return replace(
        request,
        device_budget_bytes=budgets[Medium.hbm],
        host_budget_bytes=budgets[Medium.host],
        ssd_budget_bytes=budgets[Medium.ssd],
    )


def measure(plan: MemoryPlan, decoder: Decoder, tokens: torch.Tensor) -> Measured:
    """Peaks and moved bytes of one step; the device's are all live tensors but weights, gradients and tokens."""
    apart = [tokens, *decoder.parameters(), *(p.grad for p in decoder.parameters() if p.grad is not None)]
    with ExitStack() as closing:
        step, stack = planned_step(plan, decoder, tokens, closing)
        peak = live_peak(step, apart)
        found = {} if stack is None else stack.stats()

    def of(field: str) -> dict[Medium, int]:
        return {tier: int(getattr(found[tier], field)) if tier in found else 0 for tier in TIERS}

    return Measured({Medium.hbm: peak, **of("peak_bytes")}, of("stored_bytes"), of("loaded_bytes"))


def rivals(request: PlanRequest, most: int) -> dict[str, MemoryPlan]:
    """The presets that fit and are predicted to be fastest, and of the sweep by layer greedy plan and recompute.

    Recompute is run whether it fits or not.
    """
    by_chunk, found = request.sweep is Sweep.by_chunk, dict[str, MemoryPlan]()
    if not by_chunk:
        found[LEAN] = asked_plan(replace(request, preset=MemoryPreset.recompute, chunk_size=None))
        if (plan := greedy_plan(request)) is not None:
            found["greedy"] = plan
    fitting: dict[str, tuple[float, MemoryPlan]] = {}
    for preset in RIVALS:
        own = replace(request, preset=preset, chunk_size=request.chunk_size if preset.is_by_chunk else None)
        if (preset.is_by_chunk or not by_chunk) and (plan := find_plan(own)) is not None:
            fitting[preset.value] = priced.seconds(plan, own).total, plan
    fastest = sorted(fitting, key=lambda name: fitting[name][0])[:most]
    return found | {name: fitting[name][1] for name in fastest}


def greedy_plan(request: PlanRequest) -> MemoryPlan | None:
    """The plan by layer of the greedy search."""
    own = replace(request, head_groups=1)
    problem = problem_of(own)
    layers = greedy(problem)
    rows = () if layers is None else tuple(problem.columns[number].plan for number in layers)
    return MemoryPlan("greedy", rows, cuts=own.cuts(), prefetch_layers=own.prefetch_layers) if rows else None


def check(name: str, request: PlanRequest, decoder: Decoder, options: Mapping[str, OptionValue]) -> Row:
    """The row of one configuration."""
    tokens = tokens_of(request.model, request.seq_len)
    auto = replace(request, preset=MemoryPreset.auto)
    solved = find_plan(auto)
    if solved is None:
        return Row(name, error="the solver finds no plan")
    plans = {"solved": solved, **rivals(auto, int(options["most_rivals"]))}
    if request.preset is not MemoryPreset.auto:
        plans[request.preset.value] = asked_plan(request)
    seconds = in_turn(plans, decoder, tokens, int(options["rounds"]))
    of_reference = seconds.pop(REFERENCE)
    subject = "solved" if request.preset is MemoryPreset.auto else request.preset.value
    timed_request = calibrated(request, min(of_reference))
    numbers = {"step_s": min(seconds[subject])}
    predicted_s = priced.seconds(plans[subject], timed_request).total
    numbers |= {"predicted_s": predicted_s, "step_error_pct": 100 * (predicted_s / numbers["step_s"] - 1)}
    worst, exact = 0.0, True
    for own in dict.fromkeys(("solved", subject)):
        found, numbers_of = measure(plans[own], decoder, tokens), {}
        wanted, work = priced.wanted_bytes(plans[own], request), priced.work_of(plans[own], request)
        for tier in (Medium.hbm, *TIERS):
            error = 100 * (wanted[tier] / found.peaks[tier] - 1) if found.peaks[tier] else 100.0 * bool(wanted[tier])
            numbers_of[f"{own}_{tier.value}_peak_mib"] = found.peaks[tier] / 2**20
            numbers_of[f"{own}_{tier.value}_peak_error_pct"] = error
            worst = max(worst, abs(error))
        exact &= found.stored == {Medium.host: work.host, Medium.ssd: work.ssd}
        exact &= found.loaded == {Medium.host: work.load_host, Medium.ssd: work.load_ssd}
        numbers |= numbers_of
    ratios = over(seconds, plans)
    keeps = {
        f"peaks within {CLOSE_PCT:.0f} %": worst <= CLOSE_PCT,
        "bytes moved exact": exact,
        f"at most {NOISE} x the seconds of every rival": max(ratios.values(), default=1.0) <= NOISE,
    }
    if LEAN in plans and priced.seconds(solved, auto).total <= GAIN * priced.seconds(plans[LEAN], auto).total:
        keeps[f"at most {GAIN} x those of {LEAN}"] = ratios[LEAN] <= GAIN
    numbers |= {f"seconds_over_{rival}": ratio for rival, ratio in ratios.items()}
    text = "; ".join(word if kept else f"NOT {word}" for word, kept in keeps.items())
    return Row(name, numbers | {"bytes_exact": int(exact)}, facts(auto, plans), Target(text, all(keeps.values())))


def over(seconds: Mapping[str, Sequence[float]], plans: Mapping[str, MemoryPlan]) -> dict[str, float]:
    """Of every rival: the solved plan's seconds over its own; 1 where it is the same plan."""
    own = min(seconds["solved"])
    return {
        name: 1.0 if same(plans["solved"], plans[name]) else own / min(seconds[name])
        for name in plans
        if name != "solved"
    }


def same(one: MemoryPlan, other: MemoryPlan) -> bool:
    """Whether two plans do the same work."""
    return replace(one, name="", solver="", predicted={}) == replace(other, name="", solver="", predicted={})


def in_turn(
    plans: Mapping[str, MemoryPlan], decoder: Decoder, tokens: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a step of every plan in every round, and of the reference; every other round runs backwards."""
    reference = asked_plan(reference_request(decoder.config, HardwareProfile(name="cpu", device_class=DeviceClass.cpu)))
    cases = {name: (plan, tokens) for name, plan in plans.items()}
    cases[REFERENCE] = reference, tokens_of(decoder.config, REFERENCE_TOKENS)
    found: dict[str, list[float]] = {name: [] for name in cases}
    with ExitStack() as closing:
        # A decoder runs under one plan.
        steps = {name: planned_step(plan, deepcopy(decoder), own, closing)[0] for name, (plan, own) in cases.items()}
        for number in range(rounds + 1):
            for name in list(steps) if number % 2 else list(steps)[::-1]:
                seconds = timed(steps[name])
                if number:  # the first round touches pages and makes tables
                    found[name].append(seconds)
    return found


def reference_request(model: ModelConfig, profile: HardwareProfile) -> PlanRequest:
    """The question whose answer the reference is."""
    return PlanRequest(model=model, seq_len=REFERENCE_TOKENS, profile=profile, preset=MemoryPreset.keep)


def calibrated(request: PlanRequest, seconds: float) -> PlanRequest:
    """The request with the compute efficiency at which the reference takes so many seconds."""
    profile = request.profile
    assert profile.fp32_tflops is not None, "measured"
    rate = reference_request(request.model, profile).cost().whole_flops / seconds
    return replace(request, profile=replace(profile, compute_efficiency=rate / profile.fp32_tflops / 1e12))


def facts(request: PlanRequest, plans: Mapping[str, MemoryPlan]) -> dict[str, Any]:
    """What was run, and the load beside it."""
    budgets = request.budgets()
    return {
        "budget_mib": {tier.value: (budgets[tier] or 0) / 2**20 for tier in (Medium.hbm, *TIERS)},
        "plans": {name: f"{plan.solver or plan.name}, {plan.sweep.value}" for name, plan in plans.items()},
        "compute_efficiency": request.profile.compute_efficiency,
        "num_threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
