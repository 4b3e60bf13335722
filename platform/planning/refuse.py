"""The answer to a request that does not fit: the tier, the bytes wanted and there, and three changes that would fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from headrace.platform.planning.figures import MOVED, TIMED, peaks
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.leanest import auto_wanted, lean_fits, lean_slot_bytes, leanest
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import TIER_OF
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Sweep
from headrace.workers.model.config import ATTENTION
from headrace.workers.model.head_groups import possible_groups
from headrace.workers.parallel.row_cut import chunk_problems, key_heads_problem

NUM_CHANGES = 3
OTHER_PRESETS = (
    MemoryPreset.auto,
    MemoryPreset.recompute,
    MemoryPreset.offload_host,
    MemoryPreset.offload_ssd,
    MemoryPreset.chunk_auto,
    MemoryPreset.chunk_host,
    MemoryPreset.chunk_ssd,
)
# Tokens of the smallest chunk that is proposed: each one reads all keys before it.
LEAST_CHUNK = 256
# Rows that are more times shorter than those asked for are proposed last: they help nobody who wants long rows.
MOST_SHORTER = 16


class Refused(InputError):
    """Nothing fits.

    Args:
        answer: the same for programs, with the keys of explain.to_json.
    """

    def __init__(self, message: str, answer: dict[str, Any]) -> None:
        super().__init__(message)
        self.answer = answer


def refusal(request: PlanRequest) -> Refused:
    """The error to raise for a request that does not fit."""
    over = shortages(request)
    lines = [f"memory={request.preset.value} does not fit at {request.what}:"]
    for tier, wanted, there in over:
        lines += _shortage_lines(request, tier, wanted, there)
    lines.append("any one of these would make it fit:")
    found: dict[tuple[str, ...], str] = {}
    more: list[str] = []
    tried: dict[str, bool] = {}
    for text, changed in changes(request, tried):
        # One proposal for each set of keys, the smallest change; others only where there are too few of these.
        if text in tried:
            continue
        tried[text] = fits(changed)
        if tried[text] and found.setdefault(_keys(text), text) != text:
            more.append(text)
        if len(found) == NUM_CHANGES:
            break
    chosen = [*found.values(), *more][:NUM_CHANGES]
    lines += [f"  {text}" for text in chosen] or ["  none found: take another machine, or a smaller model"]
    return Refused("\n".join(lines), refused_answer(request) | {"changes": chosen})


def refused_answer(request: PlanRequest) -> dict[str, Any]:
    """What explain.to_json says of a request that does not fit; the peaks are those of the leanest plan."""
    wanted, budgets = _wanted(request), request.budgets()
    return {
        "fits": False,
        "binding": [TIER_OF[tier] for tier, _, _ in shortages(request)],
        "plan": None,
        "predicted": {**dict.fromkeys((*TIMED, *MOVED)), **peaks(wanted, request)},
        "tiers": {
            TIER_OF[tier]: {"wanted_bytes": num_bytes, "budget_bytes": budgets[tier]}
            for tier, num_bytes in wanted.items()
        },
    }


def _wanted(request: PlanRequest) -> dict[Medium, int]:
    """Peaks of the plan that a request is judged by."""
    if request.preset is MemoryPreset.auto:
        return auto_wanted(request)
    return wanted_bytes(asked_plan(request), request)


def _shortage_lines(request: PlanRequest, tier: Medium | None, wanted: int, there: int) -> list[str]:
    name, cost, budgets = TIER_OF[tier], leanest(request).cost(), request.budgets()
    where = f"tiers.{name}.budget_gib" if tier else "of the node's, hardware.host_gib"
    if tier is Medium.ssd:
        where += ", or tiers.ssd.path on a drive with more room"
    lines = [
        f"  {name}: {wanted} bytes wanted ({wanted / GIB:.3f} GiB per rank), {there} there "
        f"({there / GIB:.3f} GiB; {where})"
    ]
    if tier is Medium.hbm and request.profile.device_class is DeviceClass.cuda:
        lines.append(
            f"    {cost.fixed_bytes / GIB:.1f} GiB of it are weights, gradients, their reduction, optimizer state"
        )
    if tier is None:
        what = "weights, gradients, optimizer state and the process" if budgets.device_is_memory else "the process"
        lines.append(f"    {budgets.process_bytes / GIB:.1f} GiB of it are {what}, whatever the plan")
    return lines


def shortages(request: PlanRequest) -> list[tuple[Medium | None, int, int]]:
    """What the request does not fit into: see Budgets.shortages. A preset is judged by its plan."""
    return request.budgets().shortages(_wanted(request))


def fits(request: PlanRequest) -> bool:
    """Whether some plan of the request's preset holds every budget, and no budget is above what the machine has."""
    profile, ranks = request.profile, request.ranks_per_node
    for num_bytes, there_gib in (
        (request.device_budget_bytes, profile.device_memory_gib),
        (None if (host := request.host_budget_bytes) is None else host * ranks, profile.host_gib),
        (None if (ssd := request.ssd_budget_bytes) is None else ssd * ranks, profile.ssd_gib),
    ):
        if num_bytes is not None and there_gib is not None and num_bytes > there_gib * GIB:
            return False
    return request.budgets().host_room(0) >= 0 and not shortages(request)


def changes(request: PlanRequest, tried: Mapping[str, bool]) -> Iterator[tuple[str, PlanRequest]]:
    """Changes that this run may make, as (override to type, the request with it). Not all of them fit.

    Args:
        tried: whether those fit that the caller has been given before it asks for the next one.
    """
    for text, changed in _all_changes(request, tried):
        if not any(key == pin or key.startswith(f"{pin}.") for key in _keys(text) for pin in request.pinned):
            yield text, changed


def _keys(text: str) -> tuple[str, ...]:
    """Of overrides to type."""
    return tuple(word.partition("=")[0] for word in text.split())


def _all_changes(request: PlanRequest, tried: Mapping[str, bool]) -> Iterator[tuple[str, PlanRequest]]:
    """Changes of one thing each, most wanted first; then of two things."""
    over = shortages(request)
    if len(over) == 1:
        tier, wanted, _ = over[0]
        if tier is not None:
            yield _budget(request, tier, wanted)
    if request.preset.is_by_chunk:
        size = asked_plan(request).cuts.chunks[0] // 2
        while size >= LEAST_CHUNK:
            unit = request.sparse.page if request.preset is MemoryPreset.chunk_sparse else request.num_sharers
            if size % unit == 0:
                yield f"chunk_size={size}", replace(request, chunk_size=size)
            size //= 2
    for preset in OTHER_PRESETS:
        if preset is not request.preset and (_may_run_by_chunk(request) or not preset.is_by_chunk):
            yield _with_preset(request, preset)
    if not request.preset.is_by_chunk and request.num_sharers == 1:
        for number in possible_groups(request.model.num_kv_heads):
            if number > request.cut_choices[-1].head_groups:
                yield f"memory.head_groups={number}", replace(request, head_groups=number)
    if request.preset is MemoryPreset.auto:
        for tier in (Medium.host, Medium.ssd):
            yield _enough_room(request, tier)
    alone = _largest(request, "seq_len")
    shorter = [(f"data.seq_len={alone}", replace(request, seq_len=alone))] if alone else []
    if alone * MOST_SHORTER >= request.seq_len:
        yield from shorter
    if rows := _largest(request, "batch_size"):
        yield f"train.batch_size={rows}", replace(request, batch_size=rows)
    others = list(_other_machines(request))
    yield from others
    yield from _shorter([(text, changed) for text, changed in others if not tried.get(text, True)], alone, tried)
    yield from shorter
    yield from _with_budgets(request)


def _shorter(
    others: Iterable[tuple[str, PlanRequest]], alone: int, tried: Mapping[str, bool]
) -> Iterator[tuple[str, PlanRequest]]:
    """Two changes at once, where one is not enough: other machines, and rows that are longer than `alone`.

    A search for lengths takes time: a second one for the same keys comes only where too few changes fit.
    """
    helped: set[tuple[str, ...]] = set()
    later = []
    for text, changed in others:
        if _keys(text) in helped:
            later.append((text, changed))
        elif (value := _largest(changed, "seq_len")) > alone:
            helped.add(_keys(text))
            yield f"{text} data.seq_len={value}", replace(changed, seq_len=value)
    if later and sum(tried.values()) < NUM_CHANGES:
        yield from _shorter(later, alone, tried)


def _with_budgets(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Every budget that is too small raised, for the preset at hand and for others."""
    for preset in (request.preset, *OTHER_PRESETS):
        if preset.is_by_chunk and not _may_run_by_chunk(request):
            continue
        word, changed = _with_preset(request, preset) if preset is not request.preset else ("", request)
        words = [word] if word else []
        for tier, wanted, _ in shortages(changed):
            if tier is not None:
                text, changed = _budget(changed, tier, wanted)
                words.append(text)
        yield " ".join(words), changed


def _other_machines(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    if request.itemsize == 4:
        yield "train.precision=bf16", replace(request, itemsize=2)
    for factor in (2, 4, 8, 16, 64, 128, 512):
        if (text := _nodes(request, factor)) is not None:
            shards = request.num_shards * request.num_replicas * factor
            per_node = _per_node(request, factor)
            yield text, replace(request, num_shards=shards, num_replicas=1, ranks_per_node=per_node)
    for factor in (2, 4, 8, 16, 32):
        if (shared := _shared_rows(request, factor)) is not None:
            yield shared
    half = request.loss_tile // 2
    if half:
        yield f"train.loss_tile={half}", replace(request, loss_tile=half)


def _may_run_by_chunk(request: PlanRequest) -> bool:
    """Whether a preset by chunk may be proposed: not to rings, nor to stages of a pipeline."""
    return request.ring == 1 and request.sweep is not Sweep.by_layer


def _num_ranks(request: PlanRequest, factor: int) -> int:
    return request.num_shards * request.tensor_degree * request.num_replicas * factor


def _per_node(request: PlanRequest, factor: int) -> int:
    """Ranks of a node of a larger cluster. A CPU's ranks share the memory of their node, so only more nodes help."""
    on_cuda = request.profile.device_class is DeviceClass.cuda
    return min(8, _num_ranks(request, factor)) if on_cuda else request.ranks_per_node


def _nodes(request: PlanRequest, factor: int) -> str | None:
    """The words for so many times the ranks; None where they do not divide."""
    num, per_node = _num_ranks(request, factor), _per_node(request, factor)
    if num % per_node or num % (request.tensor_degree * request.sequence_degree):
        return None
    return f"cluster.num_nodes={num // per_node} cluster.gpus_per_node={per_node}"


def _shared_rows(request: PlanRequest, factor: int) -> tuple[str, PlanRequest] | None:
    """So many times the ranks, which share every row: by heads as far as they divide, the rest in a ring.

    By chunk they share every chunk, and there is no ring.
    """
    text, tensor = _nodes(request, factor), request.tensor_degree
    heads, key_heads = (num // tensor for num in (request.model.num_heads, request.model.num_kv_heads))
    by_heads = math.gcd(factor, heads // request.ulysses)
    while key_heads_problem(by_heads * request.ulysses, key_heads):
        by_heads //= 2
    ulysses, ring = request.ulysses * by_heads, request.ring * factor // by_heads
    step, preset = ulysses * ring * tensor, request.preset
    sizes = () if request.chunk_size is None else (request.chunk_size,)
    degrees = {"ring": ring, "ulysses": ulysses, "tensor": tensor}
    if text is None or request.head_groups is not None or (sizes and not preset.is_by_chunk):
        return None
    if preset.is_by_chunk and any(chunk_problems(preset.value, degrees, sizes=sizes, has_pages=preset.is_lossy)):
        return None
    if request.tile_rows is not None or request.seq_len % step or set(request.model.mixers) != {ATTENTION}:
        return None
    text += f" parallel.ulysses={ulysses}" + (f" parallel.ring={ring}" if ring > 1 else "")
    return text, replace(
        request,
        num_shards=request.num_shards * factor,
        ranks_per_node=_per_node(request, factor),
        sequence_degree=ulysses * ring,
        ulysses=ulysses,
        seq_len_step=step,
    )


def _with_preset(request: PlanRequest, preset: MemoryPreset) -> tuple[str, PlanRequest]:
    """Another preset, without the keys that do not go with it."""
    drops = "" if preset.is_by_chunk or request.chunk_size is None else " chunk_size=null"
    drops += " memory.head_groups=null" if preset.is_by_chunk and request.head_groups is not None else ""
    drops += " memory.codec=null" if preset.is_by_chunk and request.codec is not None else ""
    text = f"memory={preset.value}{drops}"
    if preset.is_by_chunk:
        return text, replace(request, preset=preset, head_groups=None, codec=None)
    return text, replace(request, preset=preset, chunk_size=None)


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
    text = f"tiers.{TIER_OF[tier]}.budget_gib={gib:.{digits}f}".rstrip("0").rstrip(".")
    if tier is Medium.hbm:
        return text, replace(request, device_budget_bytes=num_bytes)
    if tier is Medium.host:
        return text, replace(request, host_budget_bytes=num_bytes)
    return text, replace(request, ssd_budget_bytes=num_bytes)


def _enough_room(request: PlanRequest, tier: Medium) -> tuple[str, PlanRequest]:
    """The least room in one tier with which auto fits; where none does, room for every layer."""
    own = leanest(request)
    slot = lean_slot_bytes(own)

    def with_room(num_layers: int) -> tuple[str, PlanRequest]:
        return _budget(own, tier, max(1, num_layers) * slot)

    numbers = range(request.model.num_layers)
    least = bisect_left(numbers, True, key=lambda number: lean_fits(with_room(number)[1]))
    return _budget(request, tier, max(1, least) * slot)


def _largest(request: PlanRequest, field: str) -> int:
    """The largest smaller value of a whole-number field that fits, in steps people use; 0 where none does."""
    limit = int(getattr(request, field))
    step = 1 if field == "batch_size" else math.lcm(128 if limit > 1024 else 16, request.seq_len_step)
    high = (limit - 1) // step
    if not high or not fits(_with(request, field, step)):
        return 0  # weights and their state alone are too much: so on most machines that are too small
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(_with(request, field, middle * step)):
            low = middle
        else:
            high = middle - 1
    return low * step
