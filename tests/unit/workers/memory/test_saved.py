"""Foreign blocks whose saved tensors leave the device: the bits of no spill, and in the tiers the bytes of the plan."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from headrace.helpers.foreign_blocks import (
    ALL_HOST,
    ALL_SSD,
    HBM,
    HOST,
    LENGTH,
    NUM_BLOCKS,
    OFF,
    ROW_BYTES,
    ROWS,
    SSD,
    WIDTH,
    Mlp,
    data,
    equal,
    model_of,
    plan_of,
    train,
)
from headrace.helpers.training import FOREIGN_HOST, FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_SSD, spilled_bytes
from headrace.storage.config import SsdTierConfig, TiersConfig
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.workers.memory import saved, spill
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence
from headrace.workers.memory.schedule import STORES_IN_FLIGHT
from headrace.workers.memory.shelf import Shelf
from headrace.workers.memory.spilling import SpillTiers


def check(
    make_block: Callable[[], nn.Module], opened: list[SpillTiers], *, x: int, others: int, run: Any = None
) -> None:
    """Equal bits, and every block that is off sends so many bytes of its input and so many others."""
    run = run or (lambda model: train(model, (LENGTH,)))
    reference, model = run(model_of(make_block)), model_of(make_block)
    with spill(model, OFF, blocks=list(model)[1:-1]):
        assert equal(run(model), reference)
    assert spilled_bytes(opened[-1].log)[Medium.host] == (NUM_BLOCKS - 1) * (x + others)


# What leaves


@pytest.mark.parametrize("x", [HBM, HOST, SSD])
@pytest.mark.parametrize("rest", [HBM, HOST, SSD])
def test_the_tiers_carry_what_the_plan_says(x: Residence, rest: Residence, opened, tmp_path: Path) -> None:
    row, model = LayerPlan.of(x=x, saved=rest), model_of(Mlp)
    plan = plan_of(row, FOREIGN_KEEP, row, FOREIGN_KEEP)
    reference = train(model_of(Mlp), (LENGTH, LENGTH))
    with spill(model, plan, tiers=TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))):
        assert equal(train(model, (LENGTH, LENGTH)), reference)
    for medium in (Medium.host, Medium.ssd):
        expected = (x.medium is medium) * WIDTH * ROW_BYTES + (rest.medium is medium) * Mlp.saved_bytes
        assert spilled_bytes(opened[0].log)[medium] == 2 * 2 * expected
    assert MemoryPlan.from_dict(plan.to_dict()) == plan


class Views(nn.Module):
    """Saves slices, a transposed and an expanded tensor of one storage, and the input in two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.proj(x).split(WIDTH, dim=-1)
        y = (q * k) + k[:, :1].expand_as(v) * v
        return x + y * x.transpose(0, 1).transpose(0, 1) + (q.mT @ v).sum() * 1e-3


def test_one_blob_for_every_storage(opened) -> None:
    # proj's output is one storage; y is another; the input serves proj as (rows, width), and the product as it is.
    check(Views, opened, x=WIDTH * ROW_BYTES, others=(3 + 1) * WIDTH * ROW_BYTES)


class Slice(nn.Module):
    """Saves the last quarter of a large storage."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(1, 1, 4).flatten(0, 1).T.contiguous()
        part = wide[3 * WIDTH :]
        return x + part.tanh().T.view(x.shape) * part.T.view(x.shape)


def test_only_the_bytes_that_are_saved_leave(opened) -> None:
    # A quarter of `wide`, and tanh's result.
    check(Slice, opened, x=0, others=2 * WIDTH * ROW_BYTES)


class Weights(nn.Module):
    """Weights and buffers of more than a page, transposed, cast, and given to a second module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("table", torch.randn(ROWS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + x @ self.inner.weight.t()
        z = y.double() @ self.inner.weight.double().t()
        return x + z.float() * self.table.view_as(x)


def test_weights_and_buffers_stay(opened) -> None:
    # The input, and y in double precision.
    check(Weights, opened, x=WIDTH * ROW_BYTES, others=2 * WIDTH * ROW_BYTES)


class Masked(nn.Module):
    """Saves a mask of bools and indices of int64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.repeat(1, 1, 2)
        y = torch.where(y > 0, y, 0.1 * y).gather(-1, y.detach().argsort(-1))
        return x + y[..., ::2]


def test_masks_and_indices(opened) -> None:
    # The mask, the indices, and what they are applied to.
    check(Masked, opened, x=0, others=2 * WIDTH * ROWS * (1 + 8 + 4))


def test_other_arguments_stay(opened) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Scaled() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.linspace(0, 1, x.numel()).view_as(x)
            for block in self.blocks:
                x = block(x, scale=(table, "unused"))
            return x

    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)

        def forward(self, x: torch.Tensor, scale: Any) -> torch.Tensor:
            return super().forward(x).exp() * scale[0]

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(2, 512, 8)
    model(x).sum().backward()
    reference = [p.grad for p in model.parameters()]
    model.zero_grad()
    with spill(model, plan_of(ALL_HOST, ALL_HOST)):
        model(x).sum().backward()
    assert equal([p.grad for p in model.parameters()], reference)
    assert spilled_bytes(opened[0].log)[Medium.host] == 2 * 2 * x.nbytes  # the input and exp's result of each


def test_small_tensors_and_tensors_of_another_device_stay(scripted_stack) -> None:
    shelf = Shelf(scripted_stack, 1, None)
    shelf.begin(0, 0)
    media = {"x": Medium.host, "saved": Medium.host}
    call = saved.Call(nn.Identity(), 0, media, shelf, [torch.empty(1, device="meta")])
    assert call.pack(torch.empty(4096)).place is None
    call = saved.Call(nn.Identity(), 0, media, shelf, [torch.empty(1)])
    notes = [call.pack(torch.arange(n)) for n in (511, 512, 0)]
    sparse = call.pack(torch.eye(64).to_sparse())
    conjugate = call.pack(torch.ones(1024, dtype=torch.complex64).conj())
    call.finish()
    assert [num_bytes for num_bytes in scripted_stack.moved.values() if num_bytes] == [4096]
    assert [call.unpack(note).tolist() for note in notes] == [list(range(511)), list(range(512)), []]
    assert call.unpack(sparse).is_sparse
    assert call.unpack(conjugate).is_conj()


# Blocks of many kinds


class Checkpointed(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x * 2, use_reentrant=False)


def test_a_checkpoint_inside_a_block(opened) -> None:
    # Its input is all that the block saves; what runs again in backward stays.
    check(Checkpointed, opened, x=0, others=WIDTH * ROW_BYTES)


class Dropped(nn.Module):
    """Modules inside modules, dropout, an operation in place that autograd allows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            Mlp(), nn.Sequential(nn.Dropout(0.1), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return self.inner(x).add_(x)


def test_modules_in_a_block(opened) -> None:
    reference, model = train(model_of(Dropped)), model_of(Dropped)
    with spill(model, OFF):
        assert equal(train(model), reference)


class Counting(nn.Module):
    """Batch norm changes its buffers in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x.flatten(0, 1)).view_as(x)


def test_buffers_that_change(opened) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        (model(data()).sum() * model(data(24)).square().sum()).backward()
        return [*(p.grad for p in model.parameters()), *model.buffers()]

    reference, model = run(model_of(Counting)), model_of(Counting)
    with spill(model, OFF):
        assert equal(run(model), reference)


def test_blocks_in_blocks_are_refused() -> None:
    model = model_of(Dropped)
    with pytest.raises(InputError, match="block 1 is a part of block 0"):
        with spill(model, plan_of(ALL_HOST, ALL_HOST), blocks=[model[1], model[1].inner]):
            pass


def test_autocast(opened) -> None:
    def run(model: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(data()).float().square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    # In bf16 all is half as long, and no blob has the 48 x 96 x 2 bytes of a weight's cast.
    check(Mlp, opened, x=WIDTH * ROW_BYTES // 2, others=Mlp.saved_bytes // 2, run=run)

    class Frozen(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    # Norm and up need their inputs no more, gelu does.
    check(Frozen, opened, x=WIDTH * ROW_BYTES // 2, others=2 * WIDTH * ROW_BYTES // 2, run=run)


# Plans


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_give_the_same_bits(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    kinds = [FOREIGN_KEEP, FOREIGN_RECOMPUTE, FOREIGN_HOST, FOREIGN_SSD, ALL_HOST, ALL_SSD]
    kinds += [LayerPlan.of(x=x, saved=rest) for x in (HBM, HOST, SSD) for rest in (HBM, HOST, SSD)]
    layers = tuple(draw.choice(kinds) for _ in range(6))
    plan = MemoryPlan("random", layers, prefetch_layers=draw.choice([0, 1, 3]))
    block = draw.choice([Mlp, Views, Masked, Checkpointed, Dropped])
    reference, model = train(model_of(block, 6)), model_of(block, 6)
    tiers = TiersConfig(ssd=SsdTierConfig(path=str(tmp_path)))
    with spill(model, MemoryPlan.from_dict(plan.to_dict()), tiers=tiers, blocks=list(model)[1:-1]):
        assert equal(train(model), reference)


# Mutants


def wrong_offset(monkeypatch) -> None:
    original = saved.Place.view
    monkeypatch.setattr(saved.Place, "view", lambda self, dtype, begin, *rest: original(self, dtype, 0, *rest))


def wrong_stride(monkeypatch) -> None:
    original = saved.Place.view

    def view(self, dtype, begin, size, stride):
        return original(self, dtype, begin, size, torch.empty(size, device="meta").stride())

    monkeypatch.setattr(saved.Place, "view", view)


def stale_load(monkeypatch) -> None:
    original = TierStack.complete_load
    monkeypatch.setattr(TierStack, "complete_load", lambda self, key: original(self, key).roll(4))


@pytest.mark.parametrize("mutant", [wrong_offset, wrong_stride, stale_load])
def test_mutants_differ(mutant, monkeypatch) -> None:
    lengths = (LENGTH, LENGTH, LENGTH)
    reference, model = train(model_of(Views), lengths), model_of(Views)
    mutant(monkeypatch)
    try:
        with spill(model, OFF):
            same = equal(train(model, lengths), reference)
    except (RuntimeError, AssertionError, KeyError, ValueError):
        same = False
    assert not same


def comes_back_from_memory_used_twice(stack: Any) -> bool:
    """Two storages, one after the other at one address."""
    shelf, memory, notes = Shelf(stack, 1, None), np.zeros(2048, np.float32), []
    shelf.begin(0, 0)
    for value in (1, 2):
        memory[:] = value
        call = saved.Call(nn.Identity(), 0, {"x": Medium.host, "saved": Medium.host}, shelf, [torch.empty(1)])
        notes.append((call, call.pack(torch.from_numpy(memory))))
        call.finish()
        for _ in range(STORES_IN_FLIGHT):
            shelf.take_turn()  # the store is complete: its source is no longer held
    return [call.unpack(note)[0].item() for call, note in notes] == [1, 2]


def test_an_address_is_no_identity(scripted_stack, monkeypatch) -> None:
    assert comes_back_from_memory_used_twice(scripted_stack)
    known: dict[int, saved.Place] = {}
    pack, leave = saved.Call.pack, saved.Place.leave

    def by_address(self: saved.Call, tensor: torch.Tensor) -> saved.Saved:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in known:
            self._places[storage._cdata] = known[storage.data_ptr()]
        note = pack(self, tensor)
        known[storage.data_ptr()] = note.place
        return note

    monkeypatch.setattr(saved.Call, "pack", by_address)
    monkeypatch.setattr(saved.Place, "leave", lambda self, *args: None if self._ticket else leave(self, *args))
    assert not comes_back_from_memory_used_twice(scripted_stack)
