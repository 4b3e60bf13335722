"""Against a loop anyone would write: the plain decoder, torch.optim.AdamW, clip_grad_norm_. No FSDP, tiers or tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headrace.workers.data.loader import TokenLoader, open_loader
from headrace.workers.job import TrainJob
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.model.decoder import Decoder
from headrace.workers.telemetry import names
from headrace.workers.train.config import Schedule
from headrace.workers.train.engine import StepTotals, TrainEngine

NUM_STEPS, WARMUP, REL = 5, 2, 1e-5
Curve = list[tuple[float, float, float]]


def plain_curve(job: TrainJob) -> Curve:
    """Loss, gradient norm and learning rate of every step of the job."""
    train, optim = job.train, job.optim
    model = Decoder(job.model)
    model.init_weights(train.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        foreach=False,
    )

    def factor(step: int) -> float:
        if step < optim.warmup_steps:
            return (step + 1) / optim.warmup_steps
        share = (step - optim.warmup_steps) / (train.steps - optim.warmup_steps)
        if optim.schedule is Schedule.linear:
            return 1.0 - share * (1.0 - optim.min_lr_ratio)
        return optim.min_lr_ratio + (1.0 - optim.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * share))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loader = open_loader(job.data, train=train, rank=0, world_size=1)
    curve = []
    for step in range(train.steps):
        batches = loader.step_batches(step)
        losses = []
        for batch in batches:
            logits = model(batch.tokens, packing=batch.packing)
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none"))
        counted = torch.cat([(batch.targets != -100).flatten() for batch in batches])
        loss = torch.cat(losses)[counted].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), math.inf if train.grad_clip is None else train.grad_clip
        )
        curve.append((float(loss.detach()), float(norm), schedule.get_last_lr()[0]))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    loader.close()
    return curve


def our_curve(run: Any) -> Curve:
    wanted = (names.LOSS_TRAIN, names.GRAD_NORM, names.LEARNING_RATE)
    return [tuple(report.metrics[name] for name in wanted) for report in run.reports]  # type: ignore[misc]


def same(ours: Curve, plain: Curve) -> bool:
    assert len(ours) == len(plain)
    return all(a == pytest.approx(b, rel=REL) for a, b in zip(ours, plain, strict=True))


JOBS: dict[str, dict[str, Any]] = {
    "llama": {},
    "clipped": {"train": {"grad_clip": 0.05}},
    "linear, decay": {"optim": {"schedule": Schedule.linear, "weight_decay": 0.5}},
    "no clip, odd tile": {"train": {"grad_clip": None, "loss_tile": 13, "micro_batches": 3}},
    "tied, qwen": {"model": {"tie_embeddings": True, "qkv_bias": True, "qk_norm": True}},
}


@pytest.fixture(scope="module")
def make(job: Callable[..., TrainJob]) -> Callable[..., TrainJob]:
    def make(**overrides: Any) -> TrainJob:
        parts: dict[str, Any] = {"train": {}, "optim": {}, "model": {}, **overrides}
        parts["train"] = {"steps": NUM_STEPS, **parts["train"]}
        parts["optim"] = {"lr": 1e-3, "warmup_steps": WARMUP, **parts["optim"]}
        parts["model"] = {"init_std": 0.1, **parts["model"]}
        return job(**parts)

    return make


@pytest.fixture(scope="module")
def oracle(make) -> Curve:
    """Of the job with no override."""
    return plain_curve(make())


@pytest.mark.parametrize("case", JOBS)
def test_losses_norms_and_rates_are_those_of_a_plain_loop(case: str, make, run_job) -> None:
    job = make(**JOBS[case])
    assert same(our_curve(run_job(job)), plain_curve(job))


@pytest.mark.parametrize("memory", ["recompute", "offload_host", "offload_ssd"])
def test_a_plan_that_moves_everything_is_still_the_plain_loop(memory: str, make, run_job, leases, oracle) -> None:
    assert same(our_curve(run_job(make(memory=memory), leases=leases)), oracle)


def test_mutant_a_dropped_micro_batch_gradient_is_seen(make, run_job, oracle, monkeypatch) -> None:
    """The loss of the first step is right; its gradient lacks the first micro-batch's."""
    forward, calls = ByLayer._forward, [0]

    def drop(self: ByLayer, batch: Any) -> torch.Tensor:
        loss = forward(self, batch)
        calls[0] += 1
        return loss if calls[0] % 2 == 0 else loss.detach() + 0.0 * loss

    monkeypatch.setattr(ByLayer, "_forward", drop)
    mutant = our_curve(run_job(make()))
    assert mutant[0][0] == pytest.approx(oracle[0][0], rel=REL)
    assert mutant[0][1] != pytest.approx(oracle[0][1], rel=REL)
    assert not same(mutant, oracle)


def test_mutant_a_count_of_the_micro_batch_in_place_of_the_step_is_seen(make, run_job, oracle, monkeypatch) -> None:
    agree = TrainEngine.agree

    def local(self: TrainEngine, batches: Any, **asked: bool) -> StepTotals:
        return replace(agree(self, batches, **asked), num_targets=2 * batches[0].num_targets)

    monkeypatch.setattr(TrainEngine, "agree", local)
    mutant = our_curve(run_job(make()))
    assert mutant[0][0] == pytest.approx(oracle[0][0], rel=0.3)  # near enough to pass unseen
    assert not same(mutant, oracle)


def test_mutant_a_resume_at_the_wrong_rows_is_seen(make, run_job, oracle, monkeypatch) -> None:
    job = make()
    first = run_job(job, stop_after=2)
    step_batches = TokenLoader.step_batches
    monkeypatch.setattr(TokenLoader, "step_batches", lambda self, step: step_batches(self, step - 1))
    mutant = our_curve(run_job(job))
    assert same(our_curve(first), oracle[:2])
    assert len(mutant) == NUM_STEPS - 2
    assert not same(mutant, oracle[2:])
