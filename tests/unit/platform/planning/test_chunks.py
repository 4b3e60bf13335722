"""Plans of the sweep by chunk: the chunk's size, bytes of every tier, FLOPs, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.helpers.planning import QWEN_7B
from headrace.platform.planning import chunks, priced
from headrace.platform.planning.answer import solve_plan
from headrace.platform.planning.chunks import lean_chunks_wanted
from headrace.platform.planning.explain import explain
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.predict import step_seconds
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset, SparseConfig
from headrace.workers.memory.plan import MemoryPlan, PagePlan, Residence, Stretch, Sweep
from headrace.workers.memory.presets import KV_PLACES
from headrace.workers.telemetry import names
from headrace.workers.telemetry.flops import MicroBatch, mfu, step_flops

TINY = replace(QWEN_7B, vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48)
GPU = HardwareProfile(
    name="gpu",
    device_class=DeviceClass.cuda,
    device_memory_gib=400.0,
    host_gib=2000.0,
    ssd_gib=8000.0,
    bf16_tflops=400.0,
    fp32_tflops=40.0,
    d2h_gbps=25.0,
    h2d_gbps=25.0,
    ssd_write_gbps=7.0,
    ssd_read_gbps=7.0,
    compute_efficiency=1.0,
    link_efficiency=1.0,
)
CPU = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)


def request(preset: MemoryPreset, seq_len: int = 1 << 20, **fields: object) -> PlanRequest:
    values = {"model": QWEN_7B, "profile": GPU, "itemsize": 2, "num_shards": 64, **fields}
    return PlanRequest(seq_len=seq_len, preset=preset, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "wanted"),
    # F (s + 2 s_g) / (5 g B) with 400 TFLOP/s: 4,571 tokens at 25 GB/s, 16,327 at 7 GB/s; the next powers of two.
    [(MemoryPreset.chunk, 4096), (MemoryPreset.chunk_host, 8192), (MemoryPreset.chunk_ssd, 16384)],
)
def test_the_chunk_hides_the_copies_of_its_tier(preset: MemoryPreset, wanted: int) -> None:
    assert chunks.chunk_size(request(preset), KV_PLACES[preset]) == wanted
    assert solve_plan(request(preset)).cuts.chunks == (wanted,)
    assert solve_plan(request(preset, chunk_size=5000)).cuts.chunks == (5000,)


def test_no_chunk_is_longer_than_a_row() -> None:
    assert solve_plan(request(MemoryPreset.chunk_host, seq_len=3000)).cuts.chunks == (3000,)


def test_shorter_rows_have_shorter_chunks_of_more_rows() -> None:
    asked = request(MemoryPreset.chunk_host, seq_len=1 << 18, buckets=(1 << 16, 1 << 18), chunk_size=4096)
    own = asked.of_length(1 << 16)
    assert (own.batch_size, solve_plan(own).cuts.chunks) == (4, (1024,))


def test_device_bytes_do_not_grow_with_the_row() -> None:
    peaks = []
    for seq_len in (1 << 17, 1 << 20, 1 << 22):
        asked = request(MemoryPreset.chunk_ssd, seq_len=seq_len, chunk_size=4096)
        peaks.append(priced.wanted_bytes(solve_plan(asked), asked)[Medium.hbm])
    assert peaks[0] == peaks[1] == peaks[2]


def test_gathered_weights_count_on_a_gpu() -> None:
    asked = request(MemoryPreset.chunk_host, seq_len=1 << 18, chunk_size=4096)
    plan = solve_plan(asked)
    few = replace(plan, gathered_layers=3)
    gathered, fewer = (priced.wanted_bytes(each, asked)[Medium.hbm] for each in (plan, few))
    of_block = (3584 + 1) * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944 + 2 * 3584
    assert gathered - fewer == 25 * of_block * 2


def test_blocks_are_gathered_for_every_chunk_where_all_of_them_do_not_fit() -> None:
    asked = request(MemoryPreset.chunk_host, seq_len=1 << 18, chunk_size=4096)
    keeping = priced.wanted_bytes(solve_plan(asked), asked)[Medium.hbm]
    whole = solve_plan(replace(asked, device_budget_bytes=keeping - 1))  # a chunk's MLP is recomputed first
    most = priced.wanted_bytes(whole, asked)[Medium.hbm]
    assert whole.gathered_layers == 28
    tight = replace(asked, device_budget_bytes=most - (4 << 30))
    plan = solve_plan(tight)
    assert 2 < plan.gathered_layers < 28
    assert priced.wanted_bytes(plan, tight)[Medium.hbm] <= tight.device_budget_bytes
    one_more = replace(plan, gathered_layers=plan.gathered_layers + 1)
    assert priced.wanted_bytes(one_more, tight)[Medium.hbm] > tight.device_budget_bytes
    none = replace(asked, device_budget_bytes=most - (16 << 30))
    assert find_plan(none) is None
    assert none.budgets().shortages(lean_chunks_wanted(replace(none, preset=MemoryPreset.chunk_auto)))


def test_tiers_hold_keys_values_and_their_gradients() -> None:
    asked = request(MemoryPreset.chunk_host, seq_len=1 << 18, chunk_size=4096)
    plan = solve_plan(asked)
    wanted = priced.wanted_bytes(plan, asked)
    of_token = 28 * 2 * 4 * 128  # layers, keys and values, heads, head size
    # The block of the last chunk never leaves.
    assert wanted[Medium.host] == of_token * ((1 << 18) - 4096) * (2 + 4)
    work = priced.work_of(plan, asked)
    assert work.host < work.load_host
    # Records of half-done steps pin the gradients that are replaced meanwhile.
    assert priced.wanted_bytes(plan, replace(asked, gradient_copies=2))[Medium.host] == wanted[Medium.host] // 6 * 10


def test_hardware_flops_count_both_stages() -> None:
    """Four chunks, everything of a chunk kept: a forward of three quarters of the row, but for the last layer."""
    asked = request(
        MemoryPreset.chunk, seq_len=4096, chunk_size=1024, model=TINY, profile=CPU, num_shards=1, itemsize=4
    )
    plan = solve_plan(asked)
    batch = MicroBatch((4096,), plan)
    found = mfu(TINY, [batch], step_s=1.0, peak_flops=1e12)
    again = (found[names.HFU_PCT] - found[names.MFU_CAUSAL_PCT]) / 100 * 1e12
    shorter = step_flops(replace(TINY, num_layers=2, vocab_size=0), [3072], causal=True) / 3
    assert again == pytest.approx(shorter, rel=2e-3)  # a causal document's share of the pairs, plus its diagonal
    assert priced.work_of(plan, asked).rerun_flops == pytest.approx(again)


SPARSE = SparseConfig(page=128, budget=64, sink=1, recent=4)


def test_page_sparse_attention_moves_and_computes_what_its_budget_says() -> None:
    asked = request(MemoryPreset.chunk_sparse, seq_len=1 << 18, chunk_size=4096, sparse=SPARSE)
    dense = replace(asked, preset=MemoryPreset.chunk_host)
    plan, whole = solve_plan(asked), solve_plan(dense)
    assert (plan.pages, plan.kv) == (PagePlan(128, 64, 1, 4), whole.kv)
    assert MemoryPlan.from_dict(plan.to_dict()) == plan
    work, dense_work = priced.work_of(plan, asked), priced.work_of(whole, dense)
    # Chunk 1 has 32 pages before it, chunk 2 has 64 and all later ones read 64.
    read, last = 32 + 62 * 64, 64
    of_page = 128 * 2 * 4 * 128  # tokens, keys and values, heads, head size
    kv = 28 * ((1 << 18) - 4096) // 128 + read * 2 * 28 + (read - last) * 27
    assert work.load_host == of_page * (2 * kv + 4 * 28 * read)
    assert work.host == of_page * (2 * 28 * ((1 << 18) - 4096) // 128 + 4 * 28 * read)
    assert priced.wanted_bytes(plan, asked)[Medium.host] == priced.wanted_bytes(whole, dense)[Medium.host]
    # Of every query: 4 Q FLOPs forward and 8 Q backward for a key that it does not see.
    seen = 4096 * (read * 128) + 64 * 4096 * 4097 // 2
    skipped = ((1 << 18) * ((1 << 18) + 1) // 2 - seen) * 28 * 12 * 3584
    assert work.skipped_flops == pytest.approx(skipped)
    assert step_seconds(work, 1, asked.cost(), asked.rates()).compute < 0.45 * asked.cost().whole_flops / 400e12
    assert work.rerun_flops < dense_work.rerun_flops
    assert MicroBatch((1 << 18,), plan).num_rows == 1
    found, needed = (mfu(QWEN_7B, [MicroBatch((1 << 18,), p)], step_s=1.0, peak_flops=1e15) for p in (plan, whole))
    executed = (found[names.HFU_PCT] - needed[names.MFU_CAUSAL_PCT]) / 100 * 1e15
    assert executed == pytest.approx(work.rerun_flops - skipped)


def test_the_plan_says_that_it_is_lossy_and_what_it_remembers() -> None:
    asked = request(MemoryPreset.chunk_sparse, seq_len=1 << 18, chunk_size=4096, sparse=SPARSE)
    text = explain(solve_plan(asked), asked)
    assert "pages       of 128 tokens; a chunk reads at most 64" in text
    assert "6.2 % of the pages are read; mean keys take 56 MiB, the choice 437.5 KiB" in text  # 4000 of 64512
    assert "lossy: loss and gradients are not those of the model; auto never chooses this plan" in text
    assert max(map(len, text.splitlines())) <= 120


def test_nothing_chooses_a_lossy_plan_but_the_user() -> None:
    tight = request(MemoryPreset.auto, seq_len=1 << 20, device_budget_bytes=1 << 30)
    with pytest.raises(InputError) as refused:
        solve_plan(tight)
    assert "chunk_sparse" not in str(refused.value)


def test_chunks_hold_whole_pages() -> None:
    odd = replace(SPARSE, page=96)
    plan = solve_plan(request(MemoryPreset.chunk_sparse, sparse=odd))
    assert plan.cuts.chunks == (96 * 85,)  # 8192 rounded down
    short = solve_plan(request(MemoryPreset.chunk_sparse, seq_len=1000, sparse=odd))
    assert (short.cuts.chunks, short.cuts.kv_block) == ((1000,), 1056)


def test_the_mlp_is_recomputed_where_the_chunk_does_not_fit() -> None:
    roomy = request(MemoryPreset.chunk_host, seq_len=1 << 18)
    kept = solve_plan(roomy)
    budget = priced.wanted_bytes(kept, roomy)[Medium.hbm] - 1
    tight = replace(roomy, device_budget_bytes=budget)
    plan = solve_plan(tight)
    assert "gate" in kept.layers[0].stretches
    assert "gate" not in plan.layers[0].stretches
    assert {"q", "out", "lse"} <= plan.layers[0].stretches.keys()
    assert priced.wanted_bytes(plan, tight)[Medium.hbm] <= budget
    with pytest.raises(InputError, match="does not fit") as refused:
        solve_plan(replace(roomy, device_budget_bytes=budget // 2))
    assert "any one of these would make it fit" in str(refused.value)


def moved(row: tuple[Stretch, ...], boundary: int, size: int) -> tuple[Stretch, ...]:
    """One more block in the place before a boundary between two places."""
    first, second = row[boundary : boundary + 2]
    end = first.end + size
    return (*row[:boundary], replace(first, end=end), replace(second, begin=end), *row[boundary + 2 :])


@pytest.mark.parametrize("on_cpu", [False, True])
def test_every_place_is_full_before_the_next_one_is_used(on_cpu: bool) -> None:
    """One block more in HBM, or on the host, and the budget is passed."""
    where = {"model": TINY, "profile": CPU, "num_shards": 1, "itemsize": 4} if on_cpu else {}
    sizes = {"seq_len": 1 << 14, "chunk_size": 1 << 9} if on_cpu else {"seq_len": 1 << 20, "chunk_size": 1 << 15}
    asked = request(MemoryPreset.chunk_auto, **sizes, **where)
    all_hbm = solve_plan(asked)
    assert [row.residence for row in all_hbm.kv] == [Residence.hbm]
    away = replace(asked, preset=MemoryPreset.chunk_ssd)
    least, most = (priced.wanted_bytes(solve_plan(each), each)[Medium.hbm] for each in (away, asked))
    of_host = priced.wanted_bytes(solve_plan(replace(asked, preset=MemoryPreset.chunk_host)), asked)[Medium.host]
    tight = replace(asked, device_budget_bytes=(2 * least + most) // 3, host_budget_bytes=of_host // 4)
    plan = solve_plan(tight)
    assert [row.residence for row in plan.kv] == [Residence.hbm, Residence.host, Residence.ssd]
    assert plan.kv == plan.kv_grads
    wanted = priced.wanted_bytes(plan, tight)
    assert not tight.budgets().shortages(wanted)
    for boundary, tier in enumerate((Medium.hbm, Medium.host)):
        more = moved(plan.kv, boundary, sizes["chunk_size"])
        over = tight.budgets().shortages(priced.wanted_bytes(replace(plan, kv=more, kv_grads=more), tight))
        assert [name for name, *_ in over] == [tier]


def test_a_device_that_is_memory_leaves_the_processes_their_part() -> None:
    """On a CPU without a device budget keys fill what the processes leave of the node's memory; the rest is on SSD."""
    where = {"model": TINY, "profile": CPU, "num_shards": 1, "itemsize": 4, "seq_len": 1 << 14, "chunk_size": 1 << 9}
    asked = request(MemoryPreset.chunk_auto, **where)
    away = replace(asked, preset=MemoryPreset.chunk_ssd)
    least, most = (priced.wanted_bytes(solve_plan(each), each)[Medium.hbm] for each in (away, asked))
    memory = (asked.budgets().process_bytes + (least + most) // 2) / (1 << 30)
    tight = replace(asked, profile=replace(CPU, host_gib=memory), ssd_budget_bytes=1 << 30, host_budget_bytes=0)
    plan = solve_plan(tight)
    assert not tight.budgets().shortages(priced.wanted_bytes(plan, tight))
    assert [row.residence for row in plan.kv] == [Residence.hbm, Residence.ssd]
    more = moved(plan.kv, 0, where["chunk_size"])
    assert tight.budgets().shortages(priced.wanted_bytes(replace(plan, kv=more, kv_grads=more), tight))


def test_the_mlp_of_a_chunk_runs_again_before_keys_leave_the_device() -> None:
    asked = request(MemoryPreset.chunk_auto, seq_len=1 << 18, chunk_size=1 << 14)
    budget = priced.wanted_bytes(solve_plan(asked), asked)[Medium.hbm] - 1
    plan = solve_plan(replace(asked, device_budget_bytes=budget))
    assert "gate" not in plan.layers[0].stretches
    assert [row.residence for row in plan.kv] == [Residence.hbm]


def test_a_drive_that_is_off_gets_no_keys() -> None:
    asked = request(MemoryPreset.chunk_auto, seq_len=1 << 18, chunk_size=1 << 14)
    host = replace(asked, preset=MemoryPreset.chunk_host)
    budget = priced.wanted_bytes(replace(solve_plan(host), gathered_layers=0), host)[Medium.hbm]
    limits = {"device_budget_bytes": budget, "ssd_budget_bytes": 0}
    assert {row.residence for row in solve_plan(replace(asked, **limits)).kv} <= {Residence.hbm, Residence.host}
    with pytest.raises(InputError, match=r"ssd: \d+ bytes wanted"):
        solve_plan(replace(asked, **limits, host_budget_bytes=1 << 20))


def test_the_plan_says_where_keys_live_and_survives_its_file() -> None:
    asked = request(MemoryPreset.chunk_ssd, chunk_size=65536)
    plan = solve_plan(asked)
    assert "16 of 65536 tokens, KV blocks of 65536; keys, values: ssd; gradients: ssd" in explain(plan, asked)
    assert "recomputed: 8" in explain(plan, asked)  # 15 of 16 chunks see 88 % of the pairs; 27 of 28 layers
    assert plan.sweep is Sweep.by_chunk
    assert MemoryPlan.from_dict(plan.to_dict()) == plan
