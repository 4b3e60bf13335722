"""A plan as a person reads it: what goes where, what it costs, what binds, what would help. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from headrace.platform.planning import priced
from headrace.platform.planning.chunks import kv_shape
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.drive_wear import planned_wear, wear_lines
from headrace.platform.planning.figures import figures
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import Work, missing_rates, step_seconds
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import TIER_OF, Change, faster_changes, find_plan
from headrace.storage.config import EnduranceConfig
from headrace.storage.core.records import Medium
from headrace.workers.memory.chunk_plan import page_index_bytes, pages_read
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, PagePlan, Residence, Sweep
from headrace.workers.model.adapter import block_skeletons
from headrace.workers.model.head_groups import whole_name
from headrace.workers.model.skeleton import Skeleton
from headrace.workers.telemetry import names

RATE_KEYS: Mapping[str, str] = {
    "flops": "hardware.fp32_tflops (bf16_tflops)",
    "d2h": "hardware.d2h_gbps",
    "h2d": "hardware.h2d_gbps",
    "ssd_write": "hardware.ssd_write_gbps",
    "ssd_read": "hardware.ssd_read_gbps",
}

Treated = tuple[LayerPlan, str]

SENT_WORDS = {
    names.TENSOR_SENT_GIB: "between tensor ranks",
    names.ULYSSES_SENT_GIB: "of heads for tokens (Ulysses)",
    names.RING_SENT_GIB: "around the ring",
}


def explain(plan: MemoryPlan, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> str:
    """Several lines of text, no colour, at most 120 columns.

    Args:
        endurance: of the SSD; None says nothing about its wear.
    """
    model, request = request.model, request.with_cuts(plan.cuts)
    head = (
        f"plan {plan.name}: {model.name}, {request.seq_len} tokens x {request.batch_size} x {request.micro_batches} "
        f"micro-batches per rank, {'bf16' if request.itemsize == 2 else 'fp32'}, on {request.profile.name}"
    )
    changes = faster_changes(plan, request)
    named = [plan.solver] if request.is_mixed and plan.solver else []
    parts = [
        [head, *named],
        layer_lines(plan, request),
        _tier_lines(plan, request, changes),
        _cost_lines(plan, request),
    ]
    parts[-1] += _help_lines(plan, request, changes)
    parts[-1] += [] if endurance is None else wear_lines(plan, request, endurance)
    return "\n\n".join("\n".join(part) for part in parts)


def to_json(plan: MemoryPlan, request: PlanRequest, *, endurance: EnduranceConfig | None = None) -> dict[str, Any]:
    """The same for programs: the plan, its figures, the tiers with budgets, the rates that are not known.

    `ssd_wear` is null where nothing is written or no rating is set.
    """
    wear = None if endurance is None else planned_wear(plan, request, endurance)
    return {
        "plan": plan.to_dict(),
        "predicted": figures(plan, request),
        "tiers": {
            TIER_OF[tier]: {"wanted_bytes": wanted, "budget_bytes": request.budgets()[tier]}
            for tier, wanted in _wanted(plan, request).items()
        },
        "unknown_rates": missing_rates(_work(plan, request), request.rates()),
        "binding": binding_tiers(faster_changes(plan, request)),
        "fits": True,
        "ssd_wear": None if wear is None else wear.to_dict(),
    }


def binding_tiers(changes: Iterable[Change]) -> list[str]:
    """Tiers that stand between a plan of auto and a faster one: with more of one, a layer would be treated faster."""
    found = {tier for change in changes for tier, _, _ in change.over}
    return [name for tier, name in TIER_OF.items() if tier in found]


def _work(plan: MemoryPlan, request: PlanRequest) -> Work:
    return priced.work_of(plan, request)


def _wanted(plan: MemoryPlan, request: PlanRequest) -> dict[Medium, int]:
    return priced.wanted_bytes(plan, request)


def layer_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    """One row for each run of equal blocks: where its tensors wait, and the bytes that stay on the device."""
    lines = ["layers      device bytes each   where its tensors wait"]
    mixers = [request.model.mixer_of(number) for number in range(len(plan.layers))]
    for (layer, mixer), (first, numbers) in _treated(zip(plan.layers, mixers, strict=True)).items():
        shape = request.shape(plan, first)
        of_kind = f"{mixer}, " if request.is_mixed else ""
        held = size(shape.cost(layer).held)
        lines.append(f"{numbers:<11} {held:<19} {of_kind}{places(layer, shape.schedule.skeleton)}")
    if plan.sweep is Sweep.by_chunk:
        lines += chunk_lines(plan, request)
    if plan.cuts.head_groups > 1:
        lines.append(f"attention   {plan.cuts.head_groups} groups of KV heads, one after another")
    if plan.cuts.codec is not None:
        coded = " ".join(n for n in shape.schedule.skeleton.skeletal if n in shape.schedule.skeleton.coded)
        takes, rate = "its time is not in the step below: set hardware.memory_gbps", request.rates().flops
        if rate is not None and shape.flops_per_byte:
            codec_s = _work(plan, request).codec_flops / rate * request.micro_batches
            takes = f"{codec_s:.3g} s of the step below, with the plain kernels"
        lines.append(f"codec       {plan.cuts.codec.value} holds {coded}; lossy; {takes}")
    return lines


def _treated(layers: Iterable[Treated]) -> dict[Treated, tuple[int, str]]:
    """The first layer and the text of all, for every treatment and mixer, in the order of the first ones.

    Treatments that take turns name the stretch.
    """
    found: dict[Treated, list[int]] = {}
    for number, layer in enumerate(layers):
        found.setdefault(layer, []).append(number)
    rows = {}
    for layer, numbers in found.items():
        first, last, num = numbers[0], numbers[-1], len(numbers)
        text = str(first) if num == 1 else f"{first}-{last}"
        rows[layer] = first, text if last - first + 1 == num else f"{num} of {text}"
    return rows


def chunk_lines(plan: MemoryPlan, request: PlanRequest) -> list[str]:
    """Chunks of a row, and where keys, values and their gradients live."""
    spans = plan.cuts.chunk_spans(request.seq_len)
    rows = [("keys, values", plan.kv), ("gradients", plan.kv_grads)]
    where = "; ".join(
        f"{name}: " + ", ".join(f"{_PLACES[s.residence]}" + (f" from token {s.begin}" if s.begin else "") for s in row)
        for name, row in rows
    )
    longest = plan.cuts.longest_chunk(request.seq_len)
    lines = [f"chunks      {len(spans)} of {longest} tokens, KV blocks of {plan.cuts.kv_block}; {where}"]
    if any(segment.state for skeleton in request.skeletons() for segment in skeleton.segments):
        lines.append("            a state of a scan lives where a KV block would that begins at its token")
    if plan.pages is not None:
        lines += page_lines(plan, plan.pages, request)
    return lines


def page_lines(plan: MemoryPlan, pages: PagePlan, request: PlanRequest) -> list[str]:
    """What page-sparse attention reads, and the bytes of what it remembers for that."""
    assert plan.cuts.kv_block is not None, "cuts of the sweep by chunk"
    chunks = plan.cuts.chunk_spans(request.seq_len)
    read = sum(pages_read(chunk, plan.cuts.kv_block, pages) for chunk in chunks)
    there = sum(chunk[0] // plan.cuts.kv_block * plan.cuts.kv_block // pages.page for chunk in chunks)
    means, chosen = page_index_bytes(kv_shape(request), plan.cuts, pages)
    return [
        f"pages       of {pages.page} tokens; a chunk reads at most {pages.budget} of the chunks before it, "
        f"the first {pages.sink} and the last {pages.recent} among them",
        f"            {100 * read / max(1, there):.3g} % of the pages are read; mean keys take {size(means)}, the "
        f"choice {size(chosen)}",
        "            lossy: loss and gradients are not those of the model; auto never chooses this plan",
    ]


def places(layer: LayerPlan, skeleton: Skeleton) -> str:
    """Where a block's skeletal tensors wait, for example "host: x out lse; recompute, host from token 512: q k v"."""
    found: dict[str, list[str]] = {}
    for name in skeleton.skeletal:
        row = layer.stretches.get(name, ())
        words = ", ".join(
            (f"{_PLACES[s.residence]} from token {s.begin}" if s.begin else _PLACES[s.residence]) for s in row
        )
        names = found.setdefault(words or _PLACES[Residence.recompute], [])
        if (whole := whole_name(name)) not in names:
            names.append(whole)
    if len(found) == 1:
        return f"{next(iter(found))}: all"
    return "; ".join(f"{words}: {' '.join(names)}" for words, names in found.items())


_PLACES = {residence: "device" if residence is Residence.hbm else residence.value for residence in Residence}


def _tier_lines(plan: MemoryPlan, request: PlanRequest, changes: Iterable[Change]) -> list[str]:
    cost, budgets, binds = request.cost(), request.budgets(), binding_tiers(changes)
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
    cost, rates, blocks = request.cost(), request.rates(), request.blocks(plan)
    work, n = _work(plan, request), request.micro_batches
    again = sum(block.rerun_flops > block.codec_flops for block in blocks)
    share = 100 * (work.rerun_flops - work.codec_flops) / (len(blocks) * cost.block_flops)
    lines = [f"recomputed in backward: {again} of {len(blocks)} blocks, {share:.0f} % of all blocks' forward FLOPs"]
    if plan.sweep is Sweep.by_chunk:
        lines = [
            f"recomputed: {share:.0f} % of all blocks' forward FLOPs, with stage 1, which makes the keys and values"
        ]
    lines.append(
        f"moves in a step: {size(n * work.host)} to the host and {size(n * work.load_host)} back, "
        f"{size(n * work.ssd)} to the SSD and {size(n * work.load_ssd)} back"
    )
    sent = [f"{size(n)} {SENT_WORDS[name]}" for name, n in sent_bytes(plan, request).items()]
    if sent:
        lines.append("a rank sends in a step: " + ", ".join(sent))
    missing = missing_rates(work, rates)
    if missing:
        lines.append("step time: not predicted; unknown: " + ", ".join(RATE_KEYS[name] for name in missing))
    else:
        s = step_seconds(work, plan.prefetch_layers, cost, rates)
        others = "recompute and codec" if work.codec_flops else "recompute"
        lines.append(
            f"step: {s.total * n:.3g} s = compute {s.compute * n:.3g} + {others} {s.recompute * n:.3g} "
            f"+ exposed transfer {s.exposed * n:.3g}"
        )
        lines.append(f"rates: {request.rates_note or request.profile.evidence.value}")
    return lines


def _help_lines(plan: MemoryPlan, request: PlanRequest, changes: Iterable[Change]) -> list[str]:
    work, budgets = _work(plan, request), request.budgets()
    if not work.rerun_flops and not work.host + work.ssd:
        return ["nothing to gain: every block keeps its tensors"]
    if plan.name != MemoryPreset.auto.value:
        best = find_plan(replace(request, preset=MemoryPreset.auto, head_groups=None))
        if best is None:
            return []
        seconds = [priced.seconds(p, request).total for p in (best, plan)]
        return ["what would help: memory=auto finds a faster plan"] if seconds[0] < seconds[1] else []
    if plan.sweep is Sweep.by_chunk:
        return []
    there = budgets[Medium.hbm]
    kept = priced.wanted_bytes(plan.keep_twin(block_skeletons(request.model, request.adapter)), request)
    found = []
    if there is not None and kept[Medium.hbm] > there:
        found.append(f"{size(kept[Medium.hbm] - there)} more device keep every tensor there")
    tried = [(change.gain_s, *over) for change in changes for over in change.over]
    for tier, name in TIER_OF.items():
        steps = [
            (gain_s / (wanted - there), wanted - there, gain_s) for gain_s, at, wanted, there in tried if at is tier
        ]
        if steps:
            _, more, gain_s = max(steps)
            found.insert(0, f"{size(more)} more {name} make the step {gain_s * request.micro_batches:.3g} s shorter")
    return ["what would help: " + found[0], *(f"  or {text}" for text in found[1:])] if found else []


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
