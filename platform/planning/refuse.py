"""The answer to a request that does not fit: the tier, the bytes wanted and there, and three changes that would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import Counts, device_peak_bytes
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import TIER_OF, arrange, overflow
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, preset_plan

NUM_CHANGES = 3
OTHER_PRESETS = (MemoryPreset.auto, MemoryPreset.recompute, MemoryPreset.offload_host, MemoryPreset.offload_ssd)


def refusal(request: PlanRequest) -> InputError:
    """The error to raise for a request that does not fit."""
    layers = leanest_layers(request)
    over = overflow(layers, request.prefetch_layers, request.cost(), request.budgets())
    lines = [f"memory={request.preset.value} does not fit at data.seq_len={request.seq_len}:"]
    for tier, wanted, there in over:
        lines.append(
            f"  {TIER_OF[tier]}: {wanted} bytes wanted ({wanted / GIB:.3f} GiB per rank), {there} there "
            f"({there / GIB:.3f} GiB; tiers.{TIER_OF[tier]}.budget_gib)"
        )
        if tier is Medium.hbm and request.profile.device_class is DeviceClass.cuda:
            lines.append(
                f"    {request.cost().fixed_bytes / GIB:.1f} GiB of it are weights, gradients, optimizer state"
            )
    lines.append("any one of these would make it fit:")
    found: dict[tuple[str, ...], str] = {}
    more: list[str] = []
    for text, changed in changes(request):
        # One proposal for each set of keys, the smallest change; others only where there are too few of these.
        keys = tuple(word.split("=")[0] for word in text.split())
        if fits(changed) and keys in found:
            more.append(text)
        elif fits(changed):
            found[keys] = text
        if len(found) == NUM_CHANGES:
            break
    chosen = [*found.values(), *more][:NUM_CHANGES]
    lines += [f"  {text}" for text in chosen] or ["  none found by changing one thing: take a smaller model"]
    return InputError("\n".join(lines))


def leanest_layers(request: PlanRequest) -> tuple[LayerPlan, ...]:
    """The layers to judge a request by: its preset's; for auto those of the lowest device peak that the tiers allow."""
    cost, budgets = request.cost(), request.budgets()
    if request.preset is not MemoryPreset.auto:
        return preset_plan(request.preset, cost.num_layers, request.prefetch_layers).layers
    left, away = cost.num_layers, {}
    for tier in (Medium.host, Medium.ssd):
        budget = budgets[tier]
        away[tier] = left if budget is None else min(left, budget // cost.slot_bytes)
        left -= away[tier]
    return arrange(Counts(0, left, away[Medium.host], away[Medium.ssd]))


def fits(request: PlanRequest) -> bool:
    """Whether some plan of the request's preset holds every budget."""
    return not overflow(leanest_layers(request), request.prefetch_layers, request.cost(), request.budgets())


def changes(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Changes of one thing each, most wanted first, as (override to type, the request with it). Not all of them fit."""
    over = overflow(leanest_layers(request), request.prefetch_layers, request.cost(), request.budgets())
    if len(over) == 1:
        tier, wanted, _ = over[0]
        most = request.profile.device_memory_gib if tier is Medium.hbm else None
        if most is None or wanted <= most * GIB:
            yield _budget(request, tier, wanted)
    for preset in OTHER_PRESETS:
        if preset is not request.preset:
            yield f"memory={preset.value}", replace(request, preset=preset)
    if request.preset is MemoryPreset.auto:
        for tier in (Medium.host, Medium.ssd):
            yield _enough_room(request, tier)
    for key, field in {"data.seq_len": "seq_len", "train.batch_size": "batch_size"}.items():
        value = _largest(request, field)
        if value:
            yield f"{key}={value}", _with(request, field, value)
    others = list(_other_machines(request))
    yield from others
    # Two changes at once, where one is not enough and the second one helps.
    alone = _largest(request, "seq_len")
    for text, changed in others:
        value = 0 if fits(changed) else _largest(changed, "seq_len")
        if value > alone:
            yield f"{text} data.seq_len={value}", replace(changed, seq_len=value)
    for num_layers in range(request.model.num_layers - 1, 0, -1):
        yield f"model.num_layers={num_layers}", replace(request, model=replace(request.model, num_layers=num_layers))


def _other_machines(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    if request.itemsize == 4:
        yield "train.precision=bf16", replace(request, itemsize=2)
    if request.profile.device_class is DeviceClass.cuda:
        for factor in (2, 8, 64):
            num = request.num_shards * factor
            nodes = max(1, num // 8)
            text = f"cluster.num_nodes={nodes} cluster.gpus_per_node={num // nodes}"
            yield text, replace(request, num_shards=num, ranks_per_node=num // nodes)
    half = request.loss_tile // 2
    if half:
        yield f"train.loss_tile={half}", replace(request, loss_tile=half)


def _with(request: PlanRequest, field: str, value: int) -> PlanRequest:
    changed: dict[str, Any] = {field: value}
    return replace(request, **changed)


def _budget(request: PlanRequest, tier: Medium, wanted_bytes: int) -> tuple[str, PlanRequest]:
    """The budget of one tier raised to what is wanted, rounded up to what a person would type."""
    per_node = 1 if tier is Medium.hbm else request.ranks_per_node
    wanted_gib = wanted_bytes * per_node / GIB
    digits = max(2, 2 - math.floor(math.log10(wanted_gib)))
    gib = math.ceil(wanted_gib * 10**digits) / 10**digits
    num_bytes = int(gib * GIB / per_node)
    text = f"tiers.{TIER_OF[tier]}.budget_gib={gib:.{digits}f}".rstrip("0")
    if tier is Medium.hbm:
        return text, replace(request, device_budget_bytes=num_bytes)
    if tier is Medium.host:
        return text, replace(request, host_budget_bytes=num_bytes)
    return text, replace(request, ssd_budget_bytes=num_bytes)


def _enough_room(request: PlanRequest, tier: Medium) -> tuple[str, PlanRequest]:
    """The least room in one tier with which auto fits; where none does, room for every layer."""
    cost, budgets = request.cost(), request.budgets()
    other = Medium.ssd if tier is Medium.host else Medium.host
    there = budgets[other]
    elsewhere = cost.num_layers if there is None else min(cost.num_layers, there // cost.slot_bytes)
    device = budgets[Medium.hbm]
    need = cost.num_layers - elsewhere
    for num in range(need + 1):
        layers = arrange(Counts(0, need - num, num + elsewhere, 0))
        if device is None or device_peak_bytes(layers, request.prefetch_layers, cost) <= device:
            need = num
            break
    return _budget(request, tier, max(need, 1) * cost.slot_bytes)


def _largest(request: PlanRequest, field: str) -> int:
    """The largest smaller value of a whole-number field that fits, in steps people use; 0 where none does."""
    limit = int(getattr(request, field))
    step = 1 if field == "batch_size" else 128 if limit > 1024 else 16
    low, high = 0, (limit - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        if fits(_with(request, field, middle * step)):
            low = middle
        else:
            high = middle - 1
    return low * step
