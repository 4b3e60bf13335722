"""Whole runs over rows of several lengths: the same numbers wherever tensors wait, however the run is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.helpers.training import SAYING, tiny_data
from headrace.storage.core.errors import InputError
from headrace.workers.data.config import DataConfig, Loader
from headrace.workers.data.loader import open_loader
from headrace.workers.data.prepare import prepare
from headrace.workers.job import TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.memory.plan import Cuts, MemoryPlan
from headrace.workers.memory.policy import apply_memory
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.skeleton import dense_skeleton
from headrace.workers.telemetry import names
from headrace.workers.train.predicted import mixed, predicted_of_step

# Lengths of which a micro-batch has one row each, and lengths of which it has several.
CLOSE, FAR = [17, 24, 32], [8, 16, 32]
TILES = {8: 2, 16: 4, 17: 8, 24: 8, 32: 8}
PLANS = ("keep", "recompute", "offload_host", "offload_ssd", "memo")


def plan_of(preset: str, model: ModelConfig, length: int) -> MemoryPlan:
    choices = Choices(length, host_fraction=0.5, ssd_fraction=0.25, inputs_on_ssd=0.5)
    skeletons = [dense_skeleton(model)] * model.num_layers
    return preset_plan(preset, skeletons, cuts=Cuts(TILES[length]), choices=choices)


@pytest.fixture(scope="module")
def bucket_data(run_folder: Path) -> Callable[[list[int]], DataConfig]:
    def make(buckets: list[int]) -> DataConfig:
        plain, source = tiny_data(run_folder / "data"), run_folder / "lengths.jsonl"
        if not source.exists():
            draw, words = random.Random(5), SAYING.split()
            texts = (" ".join(draw.choice(words) for _ in range(draw.randrange(1, 30))) for _ in range(200))
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        config = replace(plain, prepared=None, buckets=buckets, source=str(source), tokenizer=plain.prepared)
        return replace(config, prepared=str(prepare(config).folder))

    return make


@pytest.fixture(scope="module")
def make(job: Callable[..., TrainJob], bucket_data: Any) -> Callable[..., TrainJob]:
    def make(buckets: list[int] = FAR, memory: str = "keep", **overrides: Any) -> TrainJob:
        overrides["train"] = {"steps": 6, "batch_size": 1, "micro_batches": 3, **overrides.get("train", {})}
        plain = job(**overrides)
        plans = {length: plan_of(memory, plain.model, length) for length in buckets}
        return replace(plain, data=bucket_data(buckets), plan=plans.pop(32), bucket_plans=plans)

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


@pytest.mark.parametrize("memory", PLANS)
def test_a_step_is_its_rows_one_by_one_each_under_the_plan_of_its_length(
    memory: str, make, run_job, leases, run_folder
) -> None:
    """Loss and gradients of a step, bit by bit, against models that know the plan of one length only."""
    one = make(CLOSE, memory, train={"steps": 4})
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


@pytest.mark.parametrize("memory", ["offload_host", "offload_ssd"])
def test_tiers_do_not_grow_with_the_number_of_lengths(memory: str, make, job, run_job, leases) -> None:
    """Bytes of a tier at its peak: with three lengths those of the longest alone."""
    peak = names.HOST_PEAK_GIB if memory == "offload_host" else names.SSD_PEAK_GIB
    alone = job(memory=memory, train={"steps": 6, "batch_size": 1, "micro_batches": 3})
    alone = replace(alone, plan=plan_of(memory, alone.model, 32))
    one, three = (
        max(report.metrics[peak] for report in run_job(each, leases=leases).reports)
        for each in (alone, make(memory=memory))
    )
    assert one == three > 0


def test_another_number_of_ranks_or_other_rows_are_told_at_resume(make, run_job, bucket_data) -> None:
    one = make(checkpoint={"at_end": True}, train={"steps": 2})
    run_job(one)
    with pytest.raises(InputError, match=r"data.buckets=8,16,32, the run has .*data.buckets=17,24,32"):
        run_job(replace(one, data=replace(one.data, buckets=CLOSE)))
    other = replace(one, data=bucket_data(CLOSE), train=replace(one.train, steps=3))
    plans = {length: plan_of("keep", one.model, length) for length in CLOSE[:-1]}
    events = run_job(replace(other, bucket_plans=plans)).events
    assert "data.buckets was 8,16,32, is 17,24,32" in events["data_changed"]


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
