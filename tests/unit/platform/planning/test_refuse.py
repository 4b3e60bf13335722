"""A refusal names the tier and the bytes, and every change it proposes is tried here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from headrace.helpers.planning import QWEN_7B
from headrace.helpers.tiny_models import LLAMA
from headrace.platform.planning import refuse
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.hardware import DeviceClass, Evidence, HardwareProfile
from headrace.platform.planning.many import has_plan
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Sweep
from headrace.workers.model.adapter import num_params

CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu, evidence=Evidence.measured)

TINY = replace(LLAMA, vocab_size=4096, hidden_size=256, num_layers=6, intermediate_size=512)
H200 = HardwareProfile(name="h200", device_memory_gib=139.8, bf16_tflops=989.4, h2d_gbps=63, d2h_gbps=63)
H100 = replace(H200, name="h100", device_memory_gib=79.1)
MIB = 1 << 20
SMALL = PlanRequest(model=TINY, seq_len=4096, profile=CPU, device_budget_bytes=40 * MIB, ssd_budget_bytes=0)
LARGE = PlanRequest(model=QWEN_7B, seq_len=262144, profile=H200, itemsize=2, host_budget_bytes=400 << 30)


def in_memory(request: PlanRequest, left_bytes: int) -> PlanRequest:
    """On a node that has so much for each rank beside what the processes need."""
    gib = request.ranks_per_node * (request.process_bytes() + left_bytes) / GIB
    return replace(request, profile=replace(request.profile, host_gib=gib))


def apply(request: PlanRequest, override: str) -> PlanRequest:
    """Type the proposal in."""
    words = dict(word.split("=") for word in override.split())
    for key, value in words.items():
        match key:
            case "memory":
                request = replace(request, preset=MemoryPreset(value))
            case "train.precision":
                request = replace(request, itemsize={"bf16": 2, "fp32": 4}[value])
            case "model.num_layers":
                request = replace(request, model=replace(request.model, num_layers=int(value)))
            case "cluster.num_nodes" | "parallel.ring":
                pass
            case "parallel.ulysses":
                degree = int(value) * int(words.get("parallel.ring", 1))
                request = replace(request, ulysses=int(value), sequence_degree=degree, seq_len_step=degree)
            case "cluster.gpus_per_node":
                num = int(value) * int(words["cluster.num_nodes"])
                request = replace(request, num_shards=num, ranks_per_node=int(value))
            case "tiers.device.budget_gib":
                request = replace(request, device_budget_bytes=int(float(value) * GIB))
            case "tiers.host.budget_gib":
                request = replace(request, host_budget_bytes=int(float(value) * GIB / request.ranks_per_node))
            case "tiers.ssd.budget_gib":
                request = replace(request, ssd_budget_bytes=int(float(value) * GIB / request.ranks_per_node))
            case _:
                request = replace(request, **{key.rpartition(".")[2]: int(value)})
    return request


REQUESTS = {
    "keep": replace(SMALL, preset=MemoryPreset.keep),
    "recompute": replace(SMALL, preset=MemoryPreset.recompute),
    "no host": replace(SMALL, preset=MemoryPreset.offload_host, host_budget_bytes=0, device_budget_bytes=None),
    "no ssd": replace(SMALL, preset=MemoryPreset.offload_ssd, device_budget_bytes=None),
    "host for auto": replace(SMALL, device_budget_bytes=70 * MIB, host_budget_bytes=0),
    "auto": replace(SMALL, host_budget_bytes=0),
    "batch": replace(SMALL, batch_size=4, device_budget_bytes=100 * MIB),
    "four ranks share the host": replace(
        SMALL, preset=MemoryPreset.offload_host, host_budget_bytes=MIB, device_budget_bytes=None, ranks_per_node=4
    ),
    "host and device share memory": replace(in_memory(SMALL, 40 * MIB), device_budget_bytes=None),
    "all ranks share memory": replace(
        in_memory(replace(SMALL, ranks_per_node=2), 30 * MIB), device_budget_bytes=None, ssd_budget_bytes=None
    ),
    "more than the node has": replace(
        in_memory(SMALL, 40 * MIB), preset=MemoryPreset.keep, device_budget_bytes=None, ssd_budget_bytes=None
    ),
    "no room on the drive": replace(
        SMALL,
        profile=replace(CPU, ssd_gib=0.001),
        preset=MemoryPreset.offload_ssd,
        device_budget_bytes=None,
        ssd_budget_bytes=None,
    ),
    "large": replace(LARGE, profile=H100),
    "larger": replace(LARGE, profile=H100, seq_len=1 << 20),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_proposal_fits(name: str) -> None:
    request = REQUESTS[name]
    with pytest.raises(InputError) as caught:
        solve_plan(request)
    text = str(caught.value)
    wanted, there = map(int, re.search(r": (\d+) bytes wanted .*, (\d+) there", text).groups())
    assert wanted > there
    assert re.search(r"tiers\.(device|host|ssd)\.budget_gib|hardware\.host_gib", text)
    proposals = [
        line.strip() for line in text.splitlines()[text.splitlines().index("any one of these would make it fit:") + 1 :]
    ]
    assert len(proposals) == len(set(proposals)) == 3, text
    for proposal in proposals:
        solve_plan(apply(request, proposal))


def test_the_proposed_length_is_the_largest() -> None:
    request = REQUESTS["auto"]
    with pytest.raises(InputError) as caught:
        solve_plan(request)
    seq_len = int(re.search(r"^  data\.seq_len=(\d+)$", str(caught.value), re.MULTILINE).group(1))
    with pytest.raises(InputError):
        solve_plan(replace(request, seq_len=seq_len + 128))


@pytest.mark.parametrize("sweep", [None, Sweep.by_layer], ids=["any", "by layer"])
def test_the_bytes_wanted_are_the_least_with_which_it_fits(sweep: Sweep | None) -> None:
    """Rows of 256K tokens want less device memory by chunk than by layer."""
    request = replace(LARGE, device_budget_bytes=120 << 30, sweep=sweep)
    with pytest.raises(InputError) as caught:
        solve_plan(request)
    wanted = int(re.search(r"device: (\d+) bytes wanted", str(caught.value)).group(1))
    plan = solve_plan(replace(request, device_budget_bytes=wanted))
    assert plan.sweep is (sweep or Sweep.by_chunk)
    with pytest.raises(InputError):
        solve_plan(replace(request, device_budget_bytes=wanted - 1))


@pytest.mark.parametrize(("host_gib", "ssd_gib"), [(400, 0), (0, 400), (20, 25), (25, 20), (15, 30), (20, 0), (0, 0)])
def test_whether_anything_fits_has_one_answer(host_gib: int, ssd_gib: int) -> None:
    """Also where keys and values fit in host memory and on the drive together, and in neither alone."""
    request = replace(LARGE, device_budget_bytes=134 << 30)
    request = replace(request, host_budget_bytes=host_gib << 30, ssd_budget_bytes=ssd_gib << 30)
    assert (find_plan(request) is not None) == has_plan(request) == refuse.fits(request) == (host_gib + ssd_gib >= 45)


def test_rows_of_next_to_no_length_are_proposed_last() -> None:
    """The weights and their state alone take nearly all of the device: only tiny rows fit beside them."""
    request = replace(LARGE, device_budget_bytes=LARGE.cost().fixed_bytes + (3 << 30))
    texts = [text for text, _ in refuse.changes(request, {})]
    lengths = [text for text in texts if text.startswith("data.seq_len=")]
    assert len(lengths) == 1
    assert int(lengths[0].partition("=")[2]) < request.seq_len / refuse.MOST_SHORTER
    assert texts.index(lengths[0]) > max(n for n, text in enumerate(texts) if text.startswith("cluster."))


def test_impossible_values_are_named() -> None:
    with pytest.raises(InputError, match=r"tiers\.device\.budget_gib=0"):
        replace(SMALL, device_budget_bytes=0)
    with pytest.raises(InputError, match=r"data\.seq_len=0"):
        replace(SMALL, seq_len=0)
    with pytest.raises(InputError, match=r"model\.vocab_size=0"):
        replace(SMALL, model=replace(TINY, vocab_size=0))


def test_without_an_accelerator_the_model_and_its_state_count() -> None:
    """70 billion parameters are 16 bytes each: they did "fit" the 24 GB of a machine without an accelerator."""
    large = replace(QWEN_7B, num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, intermediate_size=28672)
    request = PlanRequest(model=large, seq_len=4096, profile=replace(CPU, host_gib=24.0))
    with pytest.raises(InputError) as caught:
        solve_plan(request)
    wanted = int(re.search(r"memory: (\d+) bytes wanted", str(caught.value)).group(1))
    assert 16 * num_params(large) < wanted < 17 * num_params(large)


@pytest.mark.parametrize("preset", MemoryPreset)
def test_device_and_host_tier_come_out_of_the_same_memory(preset: MemoryPreset) -> None:
    request = replace(in_memory(SMALL, 100 * MIB), preset=preset, device_budget_bytes=None, ssd_budget_bytes=None)
    try:
        plan = solve_plan(request)
    except InputError:
        assert preset is not MemoryPreset.auto
        return
    held = wanted_bytes(plan, request)
    assert held[Medium.hbm] + held[Medium.host] + request.process_bytes() <= request.profile.host_gib * GIB


def test_ranks_that_share_chunks_by_heads_are_proposed_but_no_ring_and_no_pages() -> None:
    """28 query heads and 4 KV heads: at most 4 ranks."""
    by_chunk = replace(LARGE, preset=MemoryPreset.chunk, chunk_size=8192)
    found = [text for text, _ in refuse.changes(by_chunk, {}) if "parallel.ulysses" in text]
    assert [text.split()[2:] for text in found] == [["parallel.ulysses=2"], ["parallel.ulysses=4"]]
    for other in ({"preset": MemoryPreset.chunk_sparse}, {"chunk_size": 8190}):
        texts = [text for text, _ in refuse.changes(replace(by_chunk, **other), {})]
        assert not [text for text in texts if "parallel.ulysses=4" in text], other


def test_a_refusal_tries_no_length_on_a_machine_that_the_weights_alone_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    """70 billion parameters at a million tokens on one H200: refused within two seconds, and a trial takes 15 ms."""
    large = replace(QWEN_7B, num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, intermediate_size=28672)
    request, tried = replace(LARGE, model=large, seq_len=1 << 20, host_budget_bytes=None), []
    monkeypatch.setattr(refuse, "fits", lambda changed, fits=refuse.fits: tried.append(changed) or fits(changed))
    with pytest.raises(InputError, match=r"parallel\.ulysses=16\n.*data\.seq_len="):
        solve_plan(request)
    assert len(tried) < 70, len(tried)


def test_what_a_run_pins_is_not_proposed() -> None:
    request = replace(REQUESTS["auto"], pinned=("data.seq_len", "model.num_layers", "cluster"))
    with pytest.raises(InputError) as caught:
        solve_plan(request)
    assert not re.search(r"^  (data\.seq_len|model\.num_layers|cluster)", str(caught.value), re.MULTILINE)
