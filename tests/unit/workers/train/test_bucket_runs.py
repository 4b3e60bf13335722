"""Whole runs over rows of several lengths: the same numbers wherever tensors wait, however the run is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.buckets import CLOSE, FAR, plan_of_length, tiny_bucket_data, tiny_bucket_job, with_buckets
from headrace.storage.core.errors import InputError
from headrace.workers.data.bucket_reader import BucketReader
from headrace.workers.data.config import Loader
from headrace.workers.data.loader import open_loader
from headrace.workers.job import TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.memory.policy import apply_memory
from headrace.workers.model.decoder import Decoder
from headrace.workers.telemetry import names
from headrace.workers.train.predicted import mixed, predicted_of_step

PLANS = ("keep", "recompute", "offload_host", "offload_ssd", "memo")


@pytest.fixture(scope="module")
def make(run_folder: Path) -> Callable[..., TrainJob]:
    numbers = itertools.count()

    def make(buckets: Sequence[int] = FAR, memory: str = "keep", **overrides: Any) -> TrainJob:
        return tiny_bucket_job(run_folder, run=f"lengths{next(numbers)}", buckets=buckets, memory=memory, **overrides)

    return make


@pytest.fixture(scope="module")
def reference(make, run_job) -> Any:
    return run_job(make(checkpoint={"at_end": True}))


@pytest.mark.parametrize("memory", PLANS[1:])
def test_every_plan_computes_the_same_bits(memory: str, make, run_job, reference, leases) -> None:
    assert run_job(make(memory=memory), leases=leases).curve == reference.curve


def test_a_stopped_run_goes_on_with_the_same_rows(make, run_job, reference) -> None:
    one = make()
    first = run_job(one, stop_after=2)
    second = run_job(one)
    assert first.curve + second.curve == reference.curve
    assert "data_changed" not in second.events


def test_both_loaders_train_alike(make, run_job, reference) -> None:
    one = make()
    assert run_job(replace(one, data=replace(one.data, loader=Loader.dali))).curve == reference.curve


def test_rows_count_what_they_hold(make, run_job, reference) -> None:
    one = make()
    loader = open_loader(one.data, train=one.train, rank=0, world_size=1)
    tokens = 0
    for step, report in enumerate(reference.reports):
        batches = loader.step_batches(step)
        tokens += sum(batch.num_tokens for batch in batches)
        assert report.metrics[names.TOKENS_SEEN] == tokens
        computed = sum(batch.tokens.numel() for batch in batches)
        assert computed == 3 * 32
    loader.close()
    assert tokens < 3 * 32 * len(reference.reports)


@pytest.mark.parametrize(
    "memory",
    [pytest.param(name, marks=[pytest.mark.soak] if name in ("keep", "offload_host") else []) for name in PLANS],
)
def test_a_step_is_its_rows_one_by_one_each_under_the_plan_of_its_length(
    memory: str, make, run_job, leases, run_folder
) -> None:
    """Loss and gradients of a step, bit by bit, against models that know the plan of one length only."""
    one = make(CLOSE, memory)
    loader = open_loader(one.data, train=one.train, rank=0, world_size=1)
    batches = [batch for step in range(4) for batch in loader.step_batches(step)]
    loader.close()
    assert {batch.seq_len for batch in batches} == set(CLOSE)
    assert {len(batch.tokens) for batch in batches} == {1}
    divisor = sum(batch.num_targets for batch in batches)

    together = model_of(one)
    with tiers_of(leases) as stack:
        handle = apply_memory(list(together.blocks), one.plan, stack, norm=together.norm, bucket_plans=one.bucket_plans)
        sweep = ByLayer(together, handle, None, loss_tile=32, itemsize=4)
        losses = [sweep.forward_backward(batch, divisor, step=0, micro_batch=i) for i, batch in enumerate(batches)]
        sweep.close()
    sums: dict[str, torch.Tensor] = {}
    for batch, loss in zip(batches, losses, strict=True):
        alone = model_of(one)
        with tiers_of(leases) as stack:
            handle = apply_memory(list(alone.blocks), one.plan_of(batch.seq_len), stack, norm=alone.norm)
            sweep = ByLayer(alone, handle, None, loss_tile=32, itemsize=4)
            assert torch.equal(sweep.forward_backward(batch, divisor, step=0, micro_batch=0), loss)
            sweep.close()
        for name, param in alone.named_parameters():
            sums[name] = param.grad if name not in sums else sums[name] + param.grad
    for name, param in together.named_parameters():
        assert torch.equal(param.grad, sums[name]), name


def model_of(job: TrainJob) -> Decoder:
    model = Decoder(job.model)
    model.init_weights(0)
    return model


def tiers_of(leases: Any) -> Any:
    from headrace.storage.build import open_stack
    from headrace.storage.config import TiersConfig
    from headrace.storage.transfer_log import TransferLog

    class Opened:
        def __enter__(self) -> Any:
            self.stack = open_stack(leases, TiersConfig(), device=torch.device("cpu"), log=TransferLog())
            return self.stack

        def __exit__(self, *_: Any) -> None:
            self.stack.close()

    return Opened()


@pytest.mark.parametrize("memory", [pytest.param("offload_host", marks=pytest.mark.soak), "offload_ssd"])
def test_tiers_do_not_grow_with_the_number_of_lengths(memory: str, make, job, run_job, leases) -> None:
    """Bytes of a tier at its peak: with three lengths those of the longest alone."""
    peak = names.HOST_PEAK_GIB if memory == "offload_host" else names.SSD_PEAK_GIB
    alone = job(memory=memory, train={"steps": 2, "batch_size": 1, "micro_batches": 3})
    alone = replace(alone, plan=plan_of_length(memory, alone.model, 32))
    lengths = make(memory=memory, train={"steps": 2})
    loader = open_loader(lengths.data, train=lengths.train, rank=0, world_size=1)
    assert {batch.seq_len for step in range(2) for batch in loader.step_batches(step)} == set(FAR)
    loader.close()
    one, three = (
        max(report.metrics[peak] for report in run_job(each, leases=leases).reports) for each in (alone, lengths)
    )
    assert one == three > 0


def test_other_rows_are_told_at_resume(make, run_job, run_folder) -> None:
    one = make(checkpoint={"at_end": True}, train={"steps": 1})
    run_job(one)
    with pytest.raises(InputError, match=r"data.buckets=8,16,32, the run has .*data.buckets=17,24,32"):
        run_job(replace(one, data=replace(one.data, buckets=list(CLOSE))))
    other = with_buckets(one, tiny_bucket_data(run_folder / "data", CLOSE))
    events = run_job(replace(other, train=replace(one.train, steps=2))).events
    assert "data.buckets was 8,16,32, is 17,24,32" in events["data_changed"]


def test_micro_batches_of_other_rows_are_told_at_resume(make, run_job) -> None:
    """As many rows a step, cut into more micro-batches: each has fewer rows of its length, so a step reads others."""
    one = make(checkpoint={"at_end": True}, train={"steps": 1, "batch_size": 2})
    run_job(one)
    events = run_job(replace(one, train=replace(one.train, steps=2, batch_size=1, micro_batches=6))).events
    assert "rows per micro-batch was 8,4,2, is 4,2,1: rows repeat or are left out" in events["data_changed"]


def test_mutant_a_resume_that_is_off_by_one_step_is_seen(make, run_job, reference, monkeypatch) -> None:
    one = make()
    first, read = run_job(one, stop_after=2), BucketReader.read
    monkeypatch.setattr(BucketReader, "read", lambda self, step: read(self, step - 1))
    second = run_job(one)
    assert first.curve == reference.curve[:2]
    assert [row[0] for row in second.curve] == [row[0] for row in reference.curve[2:]]
    assert all(mine[1] != right[1] for mine, right in zip(second.curve, reference.curve[2:], strict=True))


def test_evaluation_reads_every_length(make, run_job) -> None:
    still = make(train={"steps": 1, "eval_every": 1, "eval_batches": 12}, optim={"lr": 0.0})
    loader = open_loader(still.data, train=still.train, rank=0, world_size=1)
    batches = loader.eval_batches(12)
    loader.close()
    assert len({batch.seq_len for batch in batches}) == 3
    model = model_of(still)
    with torch.no_grad():
        sums = [float(model(batch.tokens, batch.targets, packing=batch.packing, loss_tile=32)) for batch in batches]
    expected = sum(sums) / sum(batch.num_targets for batch in batches)
    assert run_job(still).reports[0].metrics[names.LOSS_EVAL] == pytest.approx(expected, rel=1e-5)


def test_predictions_of_lengths_add_up_to_that_of_a_step(make) -> None:
    predicted = {
        32: {names.GPU_PEAK_GIB: 3.0, names.STEP_S: 8.0, names.EXPOSED_PCT: 50.0, names.D2H_GBPS: 2.0},
        8: {names.GPU_PEAK_GIB: 5.0, names.STEP_S: 2.0, names.EXPOSED_PCT: 0.0},
        16: {names.GPU_PEAK_GIB: 9.0},
    }
    found = mixed(predicted, {32: 0.25, 8: 0.75, 16: 0.0})
    assert found == {
        names.GPU_PEAK_GIB: 5.0,
        names.STEP_S: 3.5,
        names.EXPOSED_PCT: pytest.approx(100 * 0.25 * 4.0 / 3.5),
        names.D2H_GBPS: 2.0,
    }
    one = make()
    plans = {length: replace(one.plan_of(length), predicted=predicted[length]) for length in FAR}
    one = replace(one, plan=plans.pop(32), bucket_plans=plans)
    assert predicted_of_step(one, [32, 8, 8, 8]) == found
    assert names.STEP_S not in predicted_of_step(one, [32, 16])
