"""The simulator: streams and links by hand, steps against the closed forms of predict.py, bytes of the network."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from headrace.helpers.tiny_models import LLAMA
from headrace.platform.planning import priced
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.hardware import Evidence, HardwareProfile
from headrace.platform.planning.predict import step_seconds
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.simulate.blocks import Part, Rank
from headrace.platform.planning.simulate.by_chunk import chunk_passes
from headrace.platform.planning.simulate.engine import Event, Simulation, Stream, What
from headrace.platform.planning.simulate.network import Network, traffic
from headrace.platform.planning.simulate.stages import pipeline_timeline, stage_requests
from headrace.platform.planning.simulate.step import StepTimeline, simulate_step
from headrace.storage.core.errors import InputError
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.parallel.config import INTERLEAVED, ONE_F_ONE_B, V_HALF, ZBV, Vocabulary
from headrace.workers.parallel.dims import ParallelDims
from headrace.workers.parallel.pipeline.actions import EXTRA_IN_FLIGHT, Pipeline, default_chunks, stage_layers
from headrace.workers.telemetry import names

MODEL = replace(LLAMA, vocab_size=4096, hidden_size=512, num_layers=12, num_heads=8, intermediate_size=1024)
GPU = HardwareProfile(
    name="gpu",
    evidence=Evidence.measured,
    bf16_tflops=100.0,
    compute_efficiency=1.0,
    h2d_gbps=20.0,
    d2h_gbps=20.0,
    ssd_write_gbps=4.0,
    ssd_read_gbps=6.0,
    node_network_gbps=200.0,
    network_gbps=25.0,
)
ONE_RANK = ParallelDims(1, 1)
PRESETS = [preset for preset in MemoryPreset if preset not in (MemoryPreset.auto, MemoryPreset.chunk_sparse)]


def request(preset: MemoryPreset = MemoryPreset.keep, **changes: object) -> PlanRequest:
    values = {"seq_len": 16384, "profile": GPU, "itemsize": 2, "preset": preset, "chunk_size": 2048}
    values |= {} if preset.is_by_chunk else {"chunk_size": None}
    return PlanRequest(model=MODEL, **{**values, **changes})  # type: ignore[arg-type]


def step(asked: PlanRequest, dims: ParallelDims = ONE_RANK, plan: MemoryPlan | None = None) -> StepTimeline:
    return simulate_step(Part(asked, plan or asked_plan(asked), Network(dims, asked.ranks_per_node, asked.profile)))


def streams_of(events: list[Event]) -> list[list[Event]]:
    lanes: dict[tuple[int, Stream], list[Event]] = {}
    for event in events:
        lanes.setdefault((event.role, event.stream), []).append(event)
    return [sorted(lane, key=lambda event: event.start_s) for lane in lanes.values()]


def test_a_shared_link_halves_the_rate() -> None:
    simulation = Simulation({"host": 10.0})
    for role in (0, 1):
        simulation.add(role, Stream.d2h, What.store, 100.0, rate=10.0, link="host")
    simulation.add(2, Stream.d2h, What.store, 100.0, rate=10.0)
    assert [event.end_s for event in simulation.run()] == pytest.approx([20.0, 20.0, 10.0])


def test_a_task_that_comes_later_takes_its_part_of_the_link_only_then() -> None:
    """100 at 10/s; after 5 s a second of 20 takes half: it ends at 9 s, the first at 12 s."""
    simulation = Simulation({"host": 10.0})
    simulation.add(0, Stream.d2h, What.store, 100.0, rate=10.0, link="host")
    run = simulation.add(1, Stream.compute, What.forward, 5.0)
    simulation.add(1, Stream.d2h, What.store, 20.0, rate=10.0, link="host", needs=[run])
    assert [event.end_s for event in simulation.run()] == pytest.approx([12.0, 5.0, 9.0])


def test_what_a_slow_task_cannot_take_the_others_get() -> None:
    simulation = Simulation({"host": 10.0})
    for role, rate in enumerate((2.0, 10.0)):
        simulation.add(role, Stream.d2h, What.store, 16.0, rate=rate, link="host")
    assert [event.end_s for event in simulation.run()] == pytest.approx([8.0, 2.0])


def test_a_stream_does_one_task_at_a_time_and_no_task_waits_without_reason() -> None:
    rng = random.Random(0)
    for _ in range(20):
        simulation = Simulation({"host": 3.0})
        needs: list[list[int]] = []
        for number in range(40):
            needs.append(rng.sample(range(number), min(number, rng.randint(0, 2))))
            stream = rng.choice([Stream.compute, Stream.d2h])
            link = "host" if stream is Stream.d2h else None
            amount, rate = rng.uniform(0.1, 2.0), rng.uniform(0.5, 2.0)
            simulation.add(rng.randint(0, 1), stream, What.forward, amount, rate=rate, link=link, needs=needs[-1])
        events = simulation.run()
        assert len(events) == 40
        for lane in streams_of(events):
            assert all(one.end_s <= other.start_s + 1e-12 for one, other in pairwise(lane))
        ends = {event.end_s for event in events} | {0.0}
        for event, waits in zip(events, needs, strict=True):
            assert all(events[wait].end_s <= event.start_s for wait in waits)
            assert event.start_s in ends


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("gbps", [20.0, 0.5])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_rank_agrees_with_the_closed_forms(preset: MemoryPreset, gbps: float, micro_batches: int) -> None:
    profile = replace(GPU, h2d_gbps=gbps, d2h_gbps=gbps, ssd_write_gbps=gbps / 5, ssd_read_gbps=gbps / 4)
    asked = request(preset, profile=profile, micro_batches=micro_batches)
    plan = asked_plan(asked)
    work = priced.work_of(plan, asked)
    closed = step_seconds(work, plan.prefetch_layers, asked.cost(), asked.rates())
    found, wanted = step(asked, plan=plan).step_s, micro_batches * closed.total
    if not preset.is_by_chunk:
        assert found == pytest.approx(wanted, rel=0.02)
        return
    # The closed form lets any compute hide any copy: a lower bound. An upper one: a pass hides its own copies only, and
    # those of its first layer not at all.
    rank, rates = Rank(Simulation(), 0, Part(asked, plan, Network(ONE_RANK, 1, profile))), asked.rates()
    load_s = max((work.load_host + work.load_ssd) / (rates.h2d or 1), work.load_ssd / (rates.ssd_read or 1))
    store_s = max((work.host + work.ssd) / (rates.d2h or 1), work.ssd / (rates.ssd_write or 1))
    by_pass = sum(max(one.seconds, one.loaded * load_s, one.stored * store_s) for one in chunk_passes(rank))
    most = micro_batches * (by_pass + (load_s + store_s) / MODEL.num_layers)
    assert wanted * (1 - 1e-9) <= found <= most * (1 + 1e-9)


def test_exposed_transfers_by_hand() -> None:
    """Inputs leave so slowly that forward is 11 stores, then the head, then 11 loads and the first block's backward."""
    profile = replace(GPU, h2d_gbps=0.01, d2h_gbps=0.02)
    asked = request(MemoryPreset.offload_host, profile=profile)
    num_bytes, cost = 16384 * 512 * 2, asked.cost()
    block_s = (cost.backward_flops + asked.blocks(asked_plan(asked))[0].rerun_flops) / 1e14
    head_s = 3 * 2 * 16384 * 512 * 4096 / 1e14
    wanted = 11 * num_bytes / 0.02e9 + head_s + 11 * num_bytes / 0.01e9 + block_s
    assert step(asked).step_s == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "degrees", "shared"),
    [
        (names.TENSOR_SENT_GIB, {"tensor_degree": 2}, {"tensor": 2}),
        (names.ULYSSES_SENT_GIB, {"ulysses": 2, "sequence_degree": 2}, {"ulysses": 2}),
    ],
)
def test_ranks_that_share_chunks_send_in_every_pass(name: str, degrees: dict, shared: dict) -> None:
    """The timeline leaves out the loss and the sums of norms; of stage 1 it has all of the last block."""
    asked = request(MemoryPreset.chunk_host, profile=replace(GPU, node_network_gbps=100.0), **degrees)
    plan = asked_plan(asked)
    network = Network(ParallelDims(1, 1, **shared), 2, asked.profile)
    events = simulate_step(Part(asked, plan, network)).events
    seconds = sum(event.end_s - event.start_s for event in events if event.what in (What.tensor, What.context))
    _, rate = network.tensor() if "tensor" in shared else network.ulysses()
    assert seconds * rate == pytest.approx(sent_bytes(plan, asked)[name], rel=0.06)


def test_bytes_on_the_streams_are_those_of_the_plan() -> None:
    for preset in (MemoryPreset.offload_host, MemoryPreset.memo, MemoryPreset.ssdtrain, MemoryPreset.chunk_ssd):
        asked = request(preset)
        plan = asked_plan(asked)
        work, timeline = priced.work_of(plan, asked), step(asked, plan=plan)
        for stream, num_bytes in (
            (Stream.d2h, work.host + work.ssd),
            (Stream.h2d, work.load_host + work.load_ssd),
        ):
            assert timeline.busy(0, stream) * 20e9 == pytest.approx(num_bytes, rel=1e-6)
        assert timeline.busy(0, Stream.ssd_write) * 4e9 == pytest.approx(work.ssd, rel=1e-6)


def test_ranks_of_a_node_share_its_host_memory_and_its_drives() -> None:
    host = replace(GPU, host_gbps=40.0)
    for preset, profile, stream, gbps in (
        (MemoryPreset.offload_host, host, Stream.d2h, 5.0),
        (MemoryPreset.offload_ssd, GPU, Stream.ssd_write, 0.5),
    ):
        timeline = step(request(preset, profile=profile, ranks_per_node=8), ParallelDims(8, 1))
        assert timeline.busy(0, stream) * gbps * 1e9 == pytest.approx(11 * 16384 * 512 * 2, rel=1e-6)


def random_plan(rng: random.Random, asked: PlanRequest) -> MemoryPlan:
    """Each tensor of each block anywhere; what a presets' block keeps comes along."""
    skeleton = asked.skeleton()
    rows = []
    for _ in range(MODEL.num_layers):
        places = {name: rng.choice(list(Residence)) for name in skeleton.skeletal}
        places["x"] = rng.choice([Residence.hbm, Residence.host, Residence.ssd])
        rows.append(LayerPlan.of(**places))
    return MemoryPlan("random", tuple(rows), cuts=asked.cuts(), prefetch_layers=asked.prefetch_layers)


def test_more_bandwidth_is_never_slower() -> None:
    rng = random.Random(1)
    for _ in range(6):
        asked = request(prefetch_layers=rng.randint(0, 3))
        plan, last_s = random_plan(rng, asked), float("inf")
        for factor in (0.05, 0.3, 1.0, 5.0):
            names = ("h2d_gbps", "d2h_gbps", "ssd_write_gbps", "ssd_read_gbps")
            profile = replace(GPU, **{name: factor * getattr(GPU, name) for name in names})
            step_s = step(replace(asked, profile=profile), plan=plan).step_s
            assert step_s <= last_s * (1 + 1e-9)
            last_s = step_s


def test_bytes_of_the_network_are_those_of_the_note() -> None:
    """Qwen2.5-7B, 131,072 tokens, degree 4, forward of a block in bf16: TP 2.82 GB, Ulysses 403 MB, ring 201 MB."""
    qwen = replace(MODEL, hidden_size=3584, num_heads=28, num_kv_heads=4, intermediate_size=18944)
    found = [
        traffic(qwen, ParallelDims(1, 1, **{name: 4}), batch_tokens=131072, itemsize=2)
        for name in ("tensor", "ulysses", "ring")
    ]
    assert found[0].tensor == pytest.approx(2.82e9, rel=0.002)
    assert found[1].ulysses == pytest.approx(403e6, rel=0.002)
    assert found[2].ring == pytest.approx(201e6, rel=0.002)


def test_a_group_within_a_node_is_faster_than_one_that_spans_nodes() -> None:
    inside, across = Network(ParallelDims(1, 1, tensor=8), 8, GPU), Network(ParallelDims(1, 1, tensor=16), 8, GPU)
    assert inside.tensor() == (Stream.node_network, 200e9)
    assert across.tensor() == (Stream.network, 200e9)  # eight cards of 25 GB/s each
    assert Network(ParallelDims(1, 1, tensor=8, ring=2), 8, GPU).ring() == (Stream.network, 25e9)
    assert Network(ParallelDims(1, 1, tensor=4, ring=2), 8, GPU).ring() == (Stream.node_network, 200e9)
    stream, rate = Network(ParallelDims(1, 1, ulysses=16), 8, GPU).ulysses()
    assert (stream, rate) == (Stream.network, pytest.approx(25e9 * 15 / 8))  # 8 of 15 peers are elsewhere


def test_tensor_parallelism_is_exposed_and_a_ring_is_hidden() -> None:
    for dims, is_exposed in ((ParallelDims(1, 1, tensor=2), True), (ParallelDims(1, 1, ring=2), False)):
        asked = request(tensor_degree=dims.tensor, sequence_degree=dims.ring, ranks_per_node=2)
        sent = traffic(MODEL, dims, batch_tokens=16384, itemsize=2)
        exposed_s = 12 * 2.5 * sent.tensor / 200e9  # of four, backward repeats the two gathers
        compute_s = asked.cost().whole_flops / 1e14
        assert exposed_s > 0 if is_exposed else exposed_s == 0
        assert step(asked, dims).step_s == pytest.approx(compute_s + exposed_s, rel=1e-9)


def test_an_unknown_rate_names_its_key() -> None:
    profile = replace(GPU, node_network_gbps=None, d2h_gbps=None)
    with pytest.raises(InputError, match=r"hardware\.node_network_gbps"):
        step(request(profile=profile, tensor_degree=2, ranks_per_node=2), ParallelDims(1, 1, tensor=2))
    with pytest.raises(InputError, match=r"hardware\.d2h_gbps"):
        step(request(MemoryPreset.offload_host, profile=profile))


def pipeline_step(pipeline: Pipeline, preset: MemoryPreset, profile: HardwareProfile = GPU) -> StepTimeline:
    asked = request(preset, profile=profile, micro_batches=pipeline.num_micro_batches, ranks_per_node=8)
    requests = stage_requests(pipeline, asked)
    plans = [asked_plan(own) for own in requests]
    return pipeline_timeline(pipeline, requests, plans, ParallelDims(1, 1, pipeline=pipeline.num_ranks))


def test_bubble_of_a_pipeline_of_blocks() -> None:
    """Four stages of three blocks and a vocabulary of one token: (p - 1) / (m + p - 1) of the step is idle."""
    pipeline = Pipeline(ONE_F_ONE_B, 4, 8)
    asked = replace(request(micro_batches=8, ranks_per_node=4), model=replace(MODEL, vocab_size=1))
    requests = stage_requests(pipeline, asked)
    timeline = pipeline_timeline(
        pipeline, requests, [asked_plan(own) for own in requests], ParallelDims(1, 1, pipeline=4)
    )
    idle = 1 - sum(timeline.busy_share(rank, Stream.compute) for rank in range(4)) / 4
    assert idle == pytest.approx(3 / 11, rel=0.03)  # what stages send takes a little time


@pytest.mark.parametrize("vocabulary", EXTRA_IN_FLIGHT)
@pytest.mark.parametrize("schedule", [ONE_F_ONE_B, INTERLEAVED, ZBV, V_HALF])
def test_all_work_of_a_pipeline_is_done_once(schedule, vocabulary: Vocabulary) -> None:
    pipeline = Pipeline(schedule, 2, 4, default_chunks(schedule), vocabulary)
    timeline = pipeline_step(pipeline, MemoryPreset.recompute)
    cost = request(MemoryPreset.recompute).cost()
    rerun = sum(block.rerun_flops for block in request().blocks(asked_plan(request(MemoryPreset.recompute))))
    again = cost.head_flops if pipeline.is_shared else 0.0  # T makes the scores of S again
    busy = sum(timeline.busy(rank, Stream.compute) for rank in range(2))
    assert busy == pytest.approx(4 * (cost.whole_flops + rerun + again) / 1e14, rel=1e-6)
    for lane in streams_of(list(timeline.events)):
        assert all(one.end_s <= other.start_s + 1e-12 for one, other in pairwise(lane))


def test_a_stage_holds_the_micro_batches_of_its_schedule() -> None:
    pipeline = Pipeline(ONE_F_ONE_B, 4, 8)
    requests = stage_requests(pipeline, request(MemoryPreset.recompute, micro_batches=8))
    assert [own.in_flight for own in requests] == [4, 3, 2, 1]
    assert [own.has_head for own in requests] == [False, False, False, True]
    four, *_, one = requests
    held = one.blocks(asked_plan(one))[0].held
    assert four.blocks(asked_plan(four))[0].held == 4 * held
    four, *_, one = (replace(own, preset=MemoryPreset.offload_host) for own in requests)
    slots = [own.blocks(asked_plan(own))[0].host_slots for own in (one, four)]
    assert slots[1] == 4 * slots[0]


def test_layers_are_dealt_to_stages_as_evenly_as_they_can_be() -> None:
    assert [len(layers) for layers in stage_layers(126, 8)] == [16] * 6 + [15] * 2
    assert stage_layers(12, 4) == [range(3), range(3, 6), range(6, 9), range(9, 12)]
