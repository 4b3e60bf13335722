"""The real engine, loader, tiers and checkpoints in one process: what must be equal is compared to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from headrace.helpers.training import input_bytes_moved, moved_bytes
from headrace.kernels import dispatch
from headrace.kernels.api import Backend
from headrace.storage.config import DeviceTierConfig, TiersConfig
from headrace.storage.core.errors import DeviceBudgetExceeded, InputError, TransferFailed
from headrace.storage.core.records import Direction, Medium
from headrace.workers.data.loader import open_loader
from headrace.workers.job import RankContext, TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.memory.config import KvPlace, MemoryPreset, SparseConfig
from headrace.workers.memory.plan import PagePlan
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.telemetry.records import RankOutcome
from headrace.workers.train import session
from headrace.workers.train.config import DeviceKind, Precision
from headrace.workers.train.continuity import SETTINGS, changes, continuity_facts
from headrace.workers.train.engine import TrainEngine
from headrace.workers.train.model_state import read_model_state
from headrace.workers.train.non_finite import TrainingDiverged
from headrace.workers.train.session import run_rank

PLANS = ("keep", "recompute", "offload_host", "offload_ssd")
NUM_STEPS, HALF = 8, 4


def weights(run_dir: str) -> dict[str, torch.Tensor]:
    return dict(read_model_state(run_dir).tensors)


def test_a_run_with_page_sparse_attention_reports_its_loss_beside_dense(job, run_job, leases) -> None:
    """Every second step and after the last one; the same loss as a run that reads all pages, then another one."""
    sparse = SparseConfig(page=2, budget=3, sink=1, recent=1, place=KvPlace.ssd)

    def run(preset: MemoryPreset, train: dict[str, int], **fields: object):
        made = job()
        choices = Choices(chunk_size=8, sparse=sparse)
        plan = preset_plan(preset, [dense_skeleton(made.model)] * made.model.num_layers, choices=choices)
        made = replace(made, plan=plan, train=replace(made.train, eval_batches=1, **train), **fields)
        return [report.metrics for report in run_job(made, leases=leases).reports]

    found = run(MemoryPreset.chunk_sparse, {"steps": 3, "eval_every": 3}, compare_sparse_every=2)
    dense = run(MemoryPreset.chunk, {"steps": 1, "eval_every": 1})
    compared = [names.SPARSE_LOSS_GAP in metrics for metrics in found]
    assert compared == [False, True, True]
    last = found[-1]
    assert last[names.SPARSE_LOSS_SPARSE] == last[names.LOSS_EVAL]
    gap = last[names.SPARSE_LOSS_SPARSE] - last[names.SPARSE_LOSS_DENSE]
    assert last[names.SPARSE_LOSS_GAP] == gap != 0
    # Rows of 32 tokens: chunks 1 to 3 have 4, 8 and 12 pages before them and read 3 each, where a row is one document.
    assert all(9 / 24 <= metrics[names.SPARSE_PAGES_READ_PCT] / 100 < 1 for metrics in found)
    assert not any(name.startswith("sparse/") for metrics in dense for name in metrics)
    assert found[0][names.LOSS_TRAIN] != dense[0][names.LOSS_TRAIN]


def test_a_resumed_run_says_that_attention_reads_other_pages(job) -> None:
    kept, index = job(), SimpleNamespace(eval_fraction=0.1, global_batch=4, seed=0)
    pages, cuts = PagePlan(page=2, budget=3, sink=1, recent=1), replace(kept.plan.cuts, chunks=(8,))
    sparse = replace(kept, plan=replace(kept.plan, pages=pages, cuts=cuts))
    was, now = (continuity_facts(each, index, "", 0) for each in (kept, sparse))
    said = "memory.sparse was off, is page=2 budget=3 sink=1 recent=1 chunk_size=8"
    assert changes(was, now, SETTINGS) == [said]


def test_a_comparison_needs_rows_that_are_held_out(job, run_job) -> None:
    with pytest.raises(InputError, match=r"memory\.sparse\.compare_every=5.*holds none out"):
        run_job(job(data={"eval_fraction": 0.0}, compare_sparse_every=5))


def assert_same_weights(a: str, b: str) -> None:
    first, second = weights(a), weights(b)
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def reference(job, run_job):
    """Uninterrupted steps with everything kept."""
    kept = job(train={"steps": NUM_STEPS}, checkpoint={"at_end": True})
    return kept, run_job(kept)


@pytest.mark.parametrize("memory", PLANS)
def test_every_plan_computes_the_same_and_interruption_changes_nothing(
    memory: str, job, run_job, reference, leases
) -> None:
    """Stopped in the middle and continued, against a run with everything kept; bytes per tier by the formula."""
    reference_job, expected = reference
    interrupted = job(memory=memory, train={"steps": NUM_STEPS}, checkpoint={"at_end": True})
    first = run_job(interrupted, leases=leases, stop_after=HALF)
    assert first.result.outcome is RankOutcome.stopped
    assert first.result.last_step == HALF
    second = run_job(interrupted, leases=leases, attempt=1)
    assert second.result.outcome is RankOutcome.finished
    assert second.result.last_step == NUM_STEPS
    assert first.curve + second.curve == expected.curve
    assert_same_weights(interrupted.run_dir, reference_job.run_dir)

    layer_input = 2 * 32 * interrupted.model.hidden_size * 4
    sizes = {"micro_batches": 2, "with_norm": True}
    for attempt in range(2):
        moved = moved_bytes(interrupted.run_dir, attempt=attempt)
        for direction in Direction:
            planned = input_bytes_moved(interrupted.plan, layer_input, direction=direction, **sizes)
            for medium in (Medium.host, Medium.ssd):
                assert moved.get((medium.value, direction.value), 0) == HALF * planned[medium]


@pytest.fixture(scope="module")
def stopped(job, run_job, reference):
    """A run that was stopped in the middle, for copies to go on from."""
    interrupted = job(train={"steps": NUM_STEPS})
    assert run_job(interrupted, stop_after=HALF).curve == reference[1].curve[:HALF]
    return interrupted


def copy_of(stopped: TrainJob, tmp_path: Path) -> TrainJob:
    return replace(stopped, run_dir=shutil.copytree(stopped.run_dir, tmp_path / "run"))


def test_mutant_a_resume_that_forgets_the_generators_is_seen(
    stopped, run_job, reference, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("headrace.workers.train.checkpoint.restore_rng_state", lambda state, device: None)
    second, expected = run_job(copy_of(stopped, tmp_path)).curve, reference[1].curve[HALF:]
    assert [row[:3] for row in second] == [row[:3] for row in expected]
    assert second != expected


def test_mutant_a_resume_that_forgets_the_moments_is_seen(
    stopped, run_job, reference, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("headrace.workers.train.optim.ShardedAdamW.set_num_steps", lambda self, num_steps: None)
    assert run_job(copy_of(stopped, tmp_path)).curve != reference[1].curve[HALF:]


def test_the_loss_is_a_sum_over_the_global_batch_whatever_its_cut(job, run_job) -> None:
    """Four rows as 4 x 1, 2 x 2 and 1 x 4: the same mean over targets. Rows differ in targets that count."""
    curves = []
    for batch_size, micro_batches in ((4, 1), (2, 2), (1, 4)):
        cut = job(train={"steps": 2, "batch_size": batch_size, "micro_batches": micro_batches})
        curves.append(run_job(cut).curve)
    for curve in curves[1:]:
        for (_, loss, norm, _), (_, expected_loss, expected_norm, _) in zip(curve, curves[0], strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_mutant_a_mean_per_micro_batch_is_seen(job, run_job, monkeypatch) -> None:
    def mean_of_means(self: ByLayer, batch):
        return forward(self, batch) / batch.num_targets * mean_targets

    forward = ByLayer._forward
    whole = run_job(job(train={"steps": 1, "batch_size": 4, "micro_batches": 1})).curve[0]
    cut = job(train={"steps": 1, "batch_size": 1, "micro_batches": 4})
    loader = open_loader(cut.data, train=cut.train, rank=0, world_size=1)
    mean_targets = sum(batch.num_targets for batch in loader.step_batches(0)) / 4
    monkeypatch.setattr(ByLayer, "_forward", mean_of_means)
    mutant = run_job(cut).curve[0]
    assert mutant[1] == pytest.approx(whole[1], rel=1e-2)  # near enough to pass unseen
    assert mutant[2] != pytest.approx(whole[2], rel=1e-5)


def test_the_loss_falls_and_the_learning_rate_follows_its_schedule(reference) -> None:
    _, run = reference
    losses = [loss for _, loss, _, _ in run.curve]
    assert losses[-1] < losses[0] - 0.5
    rates = [report.metrics[names.LEARNING_RATE] for report in run.reports]
    assert rates[0] == pytest.approx(1.5e-3)
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] < 5e-4


def test_reports_carry_every_metric(job, run_job, leases) -> None:
    run = run_job(job(memory="offload_ssd", train={"steps": 2, "eval_every": 2}), leases=leases)
    assert [report.step for report in run.reports] == [1, 2]
    metrics = run.reports[-1].metrics
    wanted = {
        names.LOSS_TRAIN,
        names.LOSS_EVAL,
        names.GRAD_NORM,
        names.LEARNING_RATE,
        names.STEP_S,
        names.TOKENS_PER_S_PER_GPU,
        names.DATA_WAIT_S,
        names.MFU_CAUSAL_PCT,
        names.GPU_PEAK_GIB,
        names.HOST_PEAK_GIB,
        names.SSD_PEAK_GIB,
        names.SSD_STORED_GIB,
        names.SSD_WRITE_GBPS,
        names.SSD_READ_GBPS,
        names.EXPOSED_PCT,
        names.TOKENS_SEEN,
        names.EPOCH,
    }
    assert wanted <= set(metrics)
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics[names.TOKENS_SEEN] == 2 * 2 * 2 * 32
    assert metrics[names.SSD_STORED_GIB] * 2**30 == 2 * 2 * 2 * 32 * 32 * 4  # the last block's input stays
    assert metrics[names.HOST_STORED_GIB] == 0
    of_x = names.of_tensor(names.SSD_TENSOR_GIB, "x")
    assert {name for name in metrics if names.split_tensor(name)[1]} == {of_x}
    assert metrics[of_x] == metrics[names.SSD_PEAK_GIB]
    assert run.result.stats["tiers"]["ssd_engine"]["got"] == "posix"


def test_offload_leaves_less_on_the_device(job, run_job, leases) -> None:
    peaks = {
        memory: run_job(job(memory=memory, train={"steps": 1}), leases=leases).reports[0].metrics[names.GPU_PEAK_GIB]
        for memory in ("keep", "recompute", "offload_host")
    }
    assert peaks["offload_host"] < peaks["recompute"] < peaks["keep"]


def test_a_device_budget_that_is_too_small_ends_the_run_and_closes_everything(job, run_job, leases) -> None:
    tiers = TiersConfig(device=DeviceTierConfig(budget_gib=1e-5))
    with pytest.raises(DeviceBudgetExceeded, match="budget_gib"):
        run_job(job(tiers=tiers, memory="offload_host"), leases=leases)
    assert not torch.distributed.is_initialized()


def test_a_run_that_fails_leaves_its_transfers_and_no_thread(job, run_job, leases) -> None:
    """Fails in the third step, while layer inputs are in the tiers; the same leases serve the next run."""
    broken = job(memory="offload_ssd", train={"steps": 4})
    before = set(threading.enumerate())

    def boom(report) -> None:
        if report.step == 2:
            monkey.setattr(TrainEngine, "_global_loss_and_norm", raise_it)

    def raise_it(*_: object) -> None:
        raise TransferFailed("boom")

    with pytest.MonkeyPatch.context() as monkey, pytest.raises(TransferFailed, match="boom"):
        run_job(broken, leases=leases, also_on_step=boom)
    assert not torch.distributed.is_initialized()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith(("ssd-io", "host-io", "headrace"))]
    layer_input, moved = 2 * 32 * broken.model.hidden_size * 4, moved_bytes(broken.run_dir)
    for direction in Direction:
        planned = input_bytes_moved(broken.plan, layer_input, micro_batches=2, direction=direction, with_norm=True)
        assert moved.get(("ssd", direction.value), 0) == 3 * planned[Medium.ssd]
    again = run_job(job(memory="offload_ssd", train={"steps": 1}), leases=leases)
    assert again.result.last_step == 1


def test_a_transfer_log_that_cannot_be_written_does_not_hide_the_runs_own_error(job, run_job, leases, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headrace.storage.transfer_log.TransferLog.write_parquet", full)
    tiers = TiersConfig(device=DeviceTierConfig(budget_gib=1e-5))
    with pytest.warns(UserWarning, match="transfers.parquet: .*No space left"), pytest.raises(DeviceBudgetExceeded):
        run_job(job(tiers=tiers), leases=leases)


def test_a_device_out_of_memory_is_told_with_its_remedy(job, run_job, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("headrace.workers.train.session.TrainEngine", full)
    with pytest.raises(DeviceBudgetExceeded, match=r"own memory is not enough.*memory=recompute.*Tried to allocate"):
        run_job(job())
    assert not torch.distributed.is_initialized()


def test_a_library_out_of_device_memory_is_told_alike(job, run_job, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr("headrace.workers.train.session.TrainEngine", full)
    with pytest.raises(DeviceBudgetExceeded, match="CUBLAS_STATUS_ALLOC_FAILED"):
        run_job(job())


def test_a_terminated_process_saves_and_says_so(job, run_job, reference) -> None:
    """A real SIGTERM, turned into should_stop as a launcher does it."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    stopped = job(train={"steps": NUM_STEPS})

    def on_step(report) -> None:
        if report.step == HALF:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        result = run_rank(stopped, RankContext(), on_step=on_step, should_stop=asked.is_set)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.outcome, result.last_step) == (RankOutcome.stopped, HALF)
    assert [row[:3] for row in run_job(stopped).curve] == [row[:3] for row in reference[1].curve[HALF:]]


def test_measuring_the_device_draws_no_number_of_the_run(job, run_job, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where no rate is kept yet
    stated, first, second = (run_job(job(train={"steps": 1}, peak_flops=flops)) for flops in (1e11, 0.0, 0.0))
    assert stated.curve == first.curve == second.curve
    assert stated.result.stats["peak_source"] == "hardware profile"
    assert "best matrix product, measured 20" in first.result.stats["peak_source"]
    assert first.result.stats["peak_flops"] == second.result.stats["peak_flops"]


def test_a_gpu_that_is_not_used_is_told(job, run_job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "gpu_is_unused", lambda device: True)
    events = run_job(job(train={"steps": 1})).result.stats["events"]
    assert "has a GPU: hardware=" in next(event["text"] for event in events if event["kind"] == "gpu_unused")


def test_a_gpu_is_looked_for_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert session.gpu_is_unused(torch.device("cpu")) is there
        assert not session.gpu_is_unused(torch.device("cuda"))


def test_the_held_out_loss_is_that_of_the_plain_model(job, run_job) -> None:
    """With a rate of 0 the weights stay the first ones."""
    still = job(train={"steps": 1, "eval_every": 1, "eval_batches": 2}, optim={"lr": 0.0})
    model = Decoder(still.model)
    model.init_weights(still.train.seed)
    loader = open_loader(still.data, train=still.train, rank=0, world_size=1)
    batches = loader.eval_batches(2)
    with torch.no_grad():
        logits = torch.cat([model(batch.tokens, packing=batch.packing).flatten(0, 1) for batch in batches])
    expected = F.cross_entropy(logits, torch.cat([batch.targets.flatten() for batch in batches]))
    metrics = run_job(still).reports[0].metrics
    assert metrics[names.LOSS_EVAL] == pytest.approx(float(expected), rel=1e-5)


def test_plan_error_is_reported_against_what_was_measured(job, run_job) -> None:
    small = job(train={"steps": 1})
    predicted = {names.GPU_PEAK_GIB: 1.0, names.STEP_S: 1000.0}
    metrics = run_job(replace(small, plan=replace(small.plan, predicted=predicted))).reports[0].metrics
    assert metrics[names.GPU_PEAK_ERROR_PCT] == pytest.approx(100 * (metrics[names.GPU_PEAK_GIB] - 1.0))
    assert -100 < metrics[names.STEP_ERROR_PCT] < -90


def test_bf16_computes_near_fp32_and_keeps_fp32_weights(job, run_job) -> None:
    runs = {}
    for precision in Precision:
        low = job(train={"steps": 3, "precision": precision}, checkpoint={"at_end": True})
        runs[precision] = run_job(low)
        assert {tensor.dtype for tensor in weights(low.run_dir).values()} == {torch.float32}
    pairs = list(zip(runs[Precision.bf16].curve, runs[Precision.fp32].curve, strict=True))
    for (_, loss, norm, _), (_, expected_loss, expected_norm, _) in pairs:
        assert loss != expected_loss
        assert loss == pytest.approx(expected_loss, rel=1e-2)
        assert norm == pytest.approx(expected_norm, rel=5e-2)


def test_clipping_changes_the_update_and_not_the_reported_norm(job, run_job) -> None:
    free, clipped = (run_job(job(train={"steps": 2, "grad_clip": bound})).curve for bound in (None, 1e-4))
    assert free[0][:3] == clipped[0][:3]
    assert free[1][1] != clipped[1][1]


def test_evaluation_touches_neither_the_training_nor_its_random_numbers(job, run_job) -> None:
    without = run_job(job(train={"steps": 3})).curve
    often = run_job(job(train={"steps": 3, "eval_every": 1}))
    assert often.curve == without
    losses = [report.metrics[names.LOSS_EVAL] for report in often.reports]
    assert losses == sorted(losses, reverse=True)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(job, run_job) -> None:
    wild = job(optim={"lr": 1e30, "warmup_steps": 0}, train={"steps": 9}, checkpoint={"every": 1})
    with pytest.raises(TrainingDiverged, match=r"step \d.*optim\.lr"):
        run_job(wild)


def test_a_model_with_too_few_rows_for_the_tokenizer_is_refused(job, run_job) -> None:
    with pytest.raises(InputError, match="vocab"):
        run_job(job(model={"vocab_size": 7}))


def test_generators_are_seeded_by_the_run(job, run_job) -> None:
    first, second, other = (run_job(job(train={"steps": 1, "seed": seed})) for seed in (0, 0, 1))
    assert first.curve == second.curve
    assert first.draws != other.draws


def test_the_record_says_who_computed_every_operator(job, run_job) -> None:
    record = run_job(job(train={"steps": 1, "kernels": Backend.reference})).result.stats["operators"]
    assert record["attention"] == {"wanted": "auto", "got": "flash"}
    assert record["swiglu"] == {"wanted": "reference", "got": "reference", "why": "asked for"}
    assert set(record) > {"rms_norm", "apply_rope", "linear_cross_entropy"}


def test_a_run_by_chunk_learns_what_a_run_by_layer_does(job, run_job, leases) -> None:
    """Every residence of keys and values the same bits; whole rows the same losses but for rounding."""
    curves = []
    for memory in ("chunk", "chunk_host", "chunk_ssd"):
        by_chunk = job(memory=memory, train={"steps": 2})
        cuts = replace(by_chunk.plan.cuts, chunks=(24,), kv_block=16)
        by_chunk = replace(by_chunk, plan=replace(by_chunk.plan, cuts=cuts))
        run = run_job(by_chunk, leases=leases)
        assert run.result.stats["kv_memory"] == "plain: cpu memory needs no pages"
        curves.append(run.curve)
    assert curves[0] == curves[1] == curves[2]
    wanted = run_job(job(train={"steps": 2})).curve
    losses, wanted_losses = ([row[1] for row in curve] for curve in (curves[0], wanted))
    assert losses == pytest.approx(wanted_losses, rel=1e-6)


def test_kernels_that_cannot_compute_here_are_refused_before_the_first_step(job, run_job, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._choose.cache_clear()
    wanted = job(train={"steps": 1, "kernels": Backend.triton, "device": DeviceKind.cpu})
    with pytest.raises(InputError, match=r"train\.kernels=triton: .*; or choose train\.kernels=auto"):
        run_job(wanted)
    dispatch._choose.cache_clear()
