"""Learning rates by closed form, AdamW by its equations in fp64, the gradient norm by brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from headrace.storage.core.errors import InputError
from headrace.workers.train.config import OptimConfig, Schedule
from headrace.workers.train.optim import ShardedAdamW, clip_gradients, local_square_sum, lr_at

CONFIG = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)


def test_warm_up_rises_in_a_line_and_reaches_the_rate() -> None:
    assert [lr_at(step, CONFIG, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_at(0, replace(CONFIG, warmup_steps=0), 20) == 1.0


@pytest.mark.parametrize(
    ("schedule", "middle"), [(Schedule.cosine, 0.6), (Schedule.linear, 0.6), (Schedule.constant, 1.0)]
)
def test_schedules_start_at_the_rate_and_end_at_the_floor(schedule: Schedule, middle: float) -> None:
    config = replace(CONFIG, schedule=schedule)
    assert lr_at(4, config, 20) == pytest.approx(1.0)
    assert lr_at(12, config, 20) == pytest.approx(middle)
    assert lr_at(20, config, 20) == pytest.approx(1.0 if schedule is Schedule.constant else 0.2)
    rates = [lr_at(step, config, 20) for step in range(4, 21)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_at_a_quarter() -> None:
    assert lr_at(8, CONFIG, 20) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_run_shorter_than_its_warm_up_stays_in_it() -> None:
    assert lr_at(1, CONFIG, 2) == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("beta2", 1.0), ("eps", -1e-8), ("min_lr_ratio", 1.5)],
)
def test_values_out_of_range_are_named(key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"optim.{key}="):
        ShardedAdamW(nn.Linear(2, 2).named_parameters(), replace(OptimConfig(), **{key: value}))


def adamw(p, grads, decay, config):
    """Loshchilov and Hutter 2019, algorithm 2, written out."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        p = p - config.lr * decay * p - config.lr * m_hat / (v_hat.sqrt() + config.eps)
    return p


def test_adamw_follows_its_equations_and_spares_one_dimensional_weights() -> None:
    torch.manual_seed(0)
    model, config = nn.Linear(3, 2), OptimConfig(lr=0.1, weight_decay=0.5)
    start = {name: p.detach().double() for name, p in model.named_parameters()}
    grads = {name: [torch.randn(p.shape) for _ in range(3)] for name, p in model.named_parameters()}
    optimizer = ShardedAdamW(model.named_parameters(), config)
    for step in range(3):
        for name, p in model.named_parameters():
            p.grad = grads[name][step].clone()
        optimizer.step(config.lr)
    for name, p in model.named_parameters():
        expected = adamw(start[name], [g.double() for g in grads[name]], 0.5 if name == "weight" else 0.0, config)
        assert torch.allclose(p.double(), expected, rtol=1e-5, atol=1e-7), name


def test_state_by_name_is_enough_to_go_on() -> None:
    """Moments and step number copied into a fresh optimizer: the next step is the same to the bit."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 2) for _ in range(2)]
    config, optimizers = OptimConfig(lr=0.1), []
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizers.append(ShardedAdamW(model.named_parameters(), config))
    for _ in range(3):
        for p in models[0].parameters():
            p.grad = torch.ones_like(p)
        optimizers[0].step(config.lr)
    models[1].load_state_dict(models[0].state_dict())
    source, target = (optimizer.moments() for optimizer in optimizers)
    assert sorted(target) == ["bias.exp_avg", "bias.exp_avg_sq", "weight.exp_avg", "weight.exp_avg_sq"]
    for name, tensor in target.items():
        tensor.copy_(source[name])
    optimizers[1].set_num_steps(3)
    for model, optimizer in zip(models, optimizers, strict=True):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step(0.05)
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_norm_is_that_of_the_concatenated_gradient() -> None:
    grads = [torch.randn(5, 3), torch.randn(7), torch.zeros(0)]
    whole = torch.cat([g.flatten() for g in grads]).double()
    assert math.sqrt(local_square_sum(grads)) == pytest.approx(float(whole.norm()), rel=1e-6)
    assert local_square_sum([]) == 0


def test_the_norm_of_a_large_tensor_keeps_its_small_terms() -> None:
    large = torch.randn(4096 * 300 + 17, generator=torch.Generator().manual_seed(3)) * 1e-3
    exact = float(large.double().norm())
    assert math.sqrt(local_square_sum([large])) == pytest.approx(exact, rel=1e-7)


def test_clipping_scales_to_the_bound_and_leaves_small_gradients_alone() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
    clip_gradients([p], 5.0, None)
    clip_gradients([p], 5.0, 5.0)
    assert p.grad.tolist() == [3.0, 4.0, 0.0, 0.0]
    clip_gradients([p], 5.0, 1.0)
    assert p.grad.norm() == pytest.approx(1.0)
