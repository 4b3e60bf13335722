"""A plan as a person reads it: what goes where, what it costs, what binds, what would help. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from headrace.platform.planning.drive_wear import planned_wear, wear_lines
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import Counts, device_peak_bytes, missing_rates, step_seconds
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import TIER_OF, arrange, find_plan, overflow, rank, wanted_bytes
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence, planned_transfer_bytes

RATE_KEYS: Mapping[str, str] = {
    "flops": "hardware.fp32_tflops (bf16_tflops)",
    "d2h": "hardware.d2h_gbps",
    "h2d": "hardware.h2d_gbps",
    "ssd_write": "hardware.ssd_write_gbps",
    "ssd_read": "hardware.ssd_read_gbps",
}


def explain(plan: MemoryPlan, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> str:
    """Several lines of text, no colour, at most 120 columns.

    Args:
        endurance: of the SSD; None says nothing about its wear.
    """
    model = request.model
    head = (
        f"plan {plan.name}: {model.name}, {request.seq_len} tokens x {request.batch_size} x {request.micro_batches} "
        f"micro-batches per rank, {'bf16' if request.itemsize == 2 else 'fp32'}, on {request.profile.name}"
    )
    parts = [[head], _layer_lines(plan, request), _tier_lines(plan, request), _cost_lines(plan, request)]
    parts[-1] += [] if endurance is None else wear_lines(plan, request, endurance)
    return "\n\n".join("\n".join(part) for part in parts)


def to_json(plan: MemoryPlan, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> dict[str, Any]:
    """The same for programs: the plan, its predictions, the tiers with budgets, the rates that are not known.

    `ssd_wear` is null where nothing is written or no rating is set.
    """
    wear = None if endurance is None else planned_wear(plan, request, endurance)
    return {
        "plan": plan.to_dict(),
        "predicted": dict(plan.predicted),
        "tiers": {
            TIER_OF[tier]: {"wanted_bytes": wanted, "budget_bytes": request.budgets()[tier]}
            for tier, wanted in _wanted(plan, request).items()
        },
        "unknown_rates": missing_rates(Counts.of(plan.layers), request.rates()),
        "binds": binding_tiers(plan, request),
        "fits": True,
        "ssd_wear": None if wear is None else wear.to_dict(),
    }


def binding_tiers(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    """Tiers that stand between this plan and one with more kept blocks: those whose budget it would pass."""
    counts, cost, budgets = Counts.of(plan.layers), request.cost(), request.budgets()
    if plan.name != MemoryPreset.auto.value or counts.keep == cost.num_layers:
        return []
    over = overflow(arrange(_one_more_kept(counts)), request.prefetch_layers, cost, budgets)
    return [TIER_OF[tier] for tier, _, _ in over]


def _one_more_kept(counts: Counts) -> Counts:
    if counts.recompute:
        return replace(counts, keep=counts.keep + 1, recompute=counts.recompute - 1)
    if counts.host:
        return replace(counts, keep=counts.keep + 1, host=counts.host - 1)
    return replace(counts, keep=counts.keep + 1, ssd=counts.ssd - 1)


def _wanted(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    return wanted_bytes(plan.layers, plan.prefetch_layers, request.cost())


def _layer_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    cost = request.cost()
    lines = ["layers      layer input   the rest    device bytes each"]
    start = 0
    for layer, group in groupby(plan.layers):
        num = len(list(group))
        kept = layer.rest is Residence.hbm
        each = cost.saved_bytes if kept else cost.input_bytes if layer.layer_input is Residence.hbm else 0
        span = str(start) if num == 1 else f"{start}-{start + num - 1}"
        lines.append(f"{span:<11} {_place(layer):<13} {layer.rest.value:<11} {size(each)}")
        start += num
    return lines


def _place(layer: LayerPlan) -> str:
    return "device" if layer.layer_input is Residence.hbm else layer.layer_input.value


def _tier_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    cost, budgets, binds = request.cost(), request.budgets(), binding_tiers(plan, request)
    lines = ["tier        peak per rank   budget per rank"]
    wanted = _wanted(plan, request)
    rows = [(TIER_OF[tier], num_bytes, budgets[tier]) for tier, num_bytes in wanted.items()]
    if budgets.memory is not None:
        # Host memory as a whole is not a tier: processes and, without an accelerator, the device are in it too.
        used = budgets.process_bytes + wanted[Medium.host] + budgets.device_is_memory * wanted[Medium.hbm]
        rows.append((TIER_OF[None], used, budgets.memory))
    for name, num_bytes, there in rows:
        limit = "no limit known" if there is None else f"{size(there)} ({_percent(num_bytes, there)})"
        lines.append(f"{name:<11} {size(num_bytes):<15} {limit}" + ("  <- binds" if name in binds else ""))
    if request.profile.device_class is DeviceClass.cuda:
        lines.append(
            f"of the device, {size(cost.fixed_bytes)} are weights, gradients, their reduction and optimizer state"
        )
    if budgets.memory is not None:
        state = "" if not budgets.device_is_memory else ", with weights, gradients and optimizer state"
        lines.append(f"of the memory, {size(budgets.process_bytes)} are for the processes{state}")
    return lines


def _cost_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    counts, cost, rates = Counts.of(plan.layers), request.cost(), request.rates()
    moved = planned_transfer_bytes(plan, cost.input_bytes, request.micro_batches)
    lines = [f"recomputed in backward: {cost.num_layers - counts.keep} of {cost.num_layers} blocks"]
    lines.append(
        f"moves each way in a step: {size(moved[Medium.host])} to the host, {size(moved[Medium.ssd])} to the SSD"
    )
    missing = missing_rates(counts, rates)
    if missing:
        lines.append("step time: not predicted; unknown: " + ", ".join(RATE_KEYS[name] for name in missing))
    else:
        s = step_seconds(counts, plan.prefetch_layers, cost, rates)
        n = request.micro_batches
        lines.append(
            f"step: {s.total * n:.3g} s = compute {s.compute * n:.3g} + recompute {s.recompute * n:.3g} "
            f"+ exposed transfer {s.exposed * n:.3g}"
        )
        lines.append(f"rates: {request.rates_note or request.profile.evidence.value}")
    return lines + _help_lines(plan, request)


def _help_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    counts, cost, budgets = Counts.of(plan.layers), request.cost(), request.budgets()
    if counts.keep == cost.num_layers:
        return ["nothing to gain: every block keeps its tensors"]
    if plan.name != MemoryPreset.auto.value:
        best = find_plan(replace(request, preset=MemoryPreset.auto))
        if best is None:
            return []
        order = [rank(Counts.of(p.layers), p.prefetch_layers, cost, request.rates()) for p in (best, plan)]
        return ["what would help: memory=auto finds a faster plan"] if order[0] < order[1] else []
    more = device_peak_bytes(arrange(_one_more_kept(counts)), request.prefetch_layers, cost)
    all_kept = device_peak_bytes(arrange(Counts(cost.num_layers, 0, 0, 0)), request.prefetch_layers, cost)
    there = budgets[Medium.hbm]
    if there is None or more <= there:
        return []
    each, every = size(more - there), size(all_kept - there)
    return [f"what would help: {each} more on the device keep one more block, {every} more keep all of them"]


def size(num_bytes: int) -> str:
    """Bytes for people: the largest 1024-based unit that leaves at least 1."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{value:.4g} {unit}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} % used" if whole else "off"
