"""Step times of published systems as the simulator predicts them, at lengths and GPU counts it was not fitted to.

The compute efficiency is fitted to two published times of ALST (systems.py). Every other row
is a prediction, and no published number was looked up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.systems import CALIBRATION, SYSTEMS, calibrated, predict_system
from headrace.platform.config.load import load_run_config
from headrace.platform.keys import pick, whole_numbers
from headrace.platform.planning.priced import wanted_bytes, work_of
from headrace.platform.planning.simulate.blocks import Part
from headrace.platform.planning.simulate.step import StepTimeline
from headrace.storage.core.records import Medium
from headrace.workers.telemetry.flops import step_flops

DESCRIPTION = "published systems in the simulator: predicted step times, fitted to two times of ALST only"
OPTIONS: Mapping[str, OptionValue] = {
    "system": "all",
    "lengths": "131072,524288,1048576,2097152,4194304",
    "gpus": "1,8,32,1024",
    # Of the drives of a node: a profile knows none, so these are assumed (ssdtrain only).
    "ssd_write_gbps": 25.0,
    "ssd_read_gbps": 25.0,
}
WORDS = ("model=llama3_8b", "hardware=h100_80g", "train=bf16")
# The fit has one number for two times.
CLOSE_PCT = 10.0
GIB = 1024**3


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """Rows of the fit, then of each system, length and number of GPUs.

    Raises:
        InputError: a system, length or number that is not one.
    """
    chosen = str(options["system"])
    systems = list(SYSTEMS) if chosen == "all" else [pick("system", chosen, list(SYSTEMS))]
    config = load_run_config([*WORDS, "data.max_bytes=null"]).config
    write, read = (float(options[name]) for name in ("ssd_write_gbps", "ssd_read_gbps"))
    model, profile = config.model, calibrated(config.model, config.hardware)
    profile = replace(profile, ssd_write_gbps=write, ssd_read_gbps=read)
    for seq_len, num_gpus, seconds in CALIBRATION:
        part, timeline = predict_system("alst", model, profile, seq_len=seq_len, num_gpus=num_gpus)
        error_pct = 100 * (timeline.step_s / seconds - 1)
        numbers = _numbers(part, timeline) | {"published_s": seconds, "error_pct": error_pct}
        target = Target(f"fit within {CLOSE_PCT:.0f} %", abs(error_pct) <= CLOSE_PCT)
        facts = {"compute_efficiency": profile.compute_efficiency, **_facts(part)}
        yield Row(f"fit alst {seq_len} tokens {num_gpus} GPUs", numbers, facts, target)
    for name in systems:
        for num_gpus in whole_numbers("gpus", str(options["gpus"])):
            for seq_len in whole_numbers("lengths", str(options["lengths"])):
                part, timeline = predict_system(name, model, profile, seq_len=seq_len, num_gpus=num_gpus)
                yield Row(f"{name} {seq_len} tokens {num_gpus} GPUs", _numbers(part, timeline), _facts(part))


def _numbers(part: Part, timeline: StepTimeline) -> dict[str, float]:
    request, dims, step_s = part.request, part.network.dims, timeline.step_s
    degree = dims.tensor * dims.ulysses * dims.ring
    peak = (request.profile.bf16_tflops or 0.0) * 1e12
    done = request.cost().whole_flops + work_of(part.plan, request).rerun_flops
    full = step_flops(request.model, [request.seq_len], causal=False) / degree
    peaks = wanted_bytes(part.plan, request)
    return {
        "step_s": step_s,
        "tokens_per_s_per_gpu": request.seq_len / degree / step_s,
        "mfu_causal_pct": 100 * request.cost().whole_flops / step_s / peak,
        "mfu_full_attention_pct": 100 * full / step_s / peak,
        "hfu_pct": 100 * done / step_s / peak,
        "states_gib": request.cost().fixed_bytes / GIB,
        "device_gib": peaks[Medium.hbm] / GIB,
        "host_gib_per_node": request.ranks_per_node * peaks[Medium.host] / GIB,
        "ssd_gib_per_node": request.ranks_per_node * peaks[Medium.ssd] / GIB,
    }


def _facts(part: Part) -> dict[str, Any]:
    dims = part.network.dims
    degrees = {name: getattr(dims, name) for name in ("data", "fsdp", "tensor", "ulysses", "ring")}
    return {"model": part.request.model.name, "hardware": part.request.profile.name, **degrees}
