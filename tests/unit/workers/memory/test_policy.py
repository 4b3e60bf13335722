from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from headrace.helpers.tiers import FakeTier, Faults, open_fake_stack
from headrace.helpers.training import (
    FOREIGN_HOST,
    FOREIGN_KEEP,
    FOREIGN_RECOMPUTE,
    FOREIGN_SSD,
    foreign_plan,
    input_bytes_moved,
)
from headrace.storage.core.errors import InputError, TransferFailed
from headrace.storage.core.records import Direction, Medium
from headrace.storage.transfer_log import TransferLog
from headrace.workers.memory import opaque
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.policy import apply_memory
from headrace.workers.memory.shelf import Shelf

KEEP, RECOMPUTE = FOREIGN_KEEP, FOREIGN_RECOMPUTE
HOST, SSD = FOREIGN_HOST, FOREIGN_SSD
MIXED = MemoryPlan("mixed", (HOST, SSD, RECOMPUTE, KEEP))
ALL_HOST = MemoryPlan("host", (HOST,) * 4)
ALL_HOST_2 = MemoryPlan("host", (HOST,) * 2)
UNUSUAL = MemoryPlan("unusual", (KEEP, HOST, KEEP, SSD), prefetch_layers=2)
INPUT_BYTES = 2 * 8 * 16 * 4


def train(model: nn.Module, tokens: torch.Tensor, plan: MemoryPlan, stack: Any, steps: int = 3) -> list[torch.Tensor]:
    """SGD with two micro-batches a step; every loss and, at the end, every gradient and parameter."""
    torch.manual_seed(123)
    handle = apply_memory(model.blocks, plan, stack)
    seen = []
    for step in range(steps):
        for p in model.parameters():
            p.grad = None
        for micro_batch in range(2):
            handle.begin(step, micro_batch)
            loss = model(tokens.roll(micro_batch, 1))
            loss.backward()
            handle.end()
            seen.append(loss.detach())
        seen += [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-2 * p.grad
    handle.remove()
    return seen


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plans() -> list[MemoryPlan]:
    named = [foreign_plan(name, 4) for name in ("recompute", "offload_host", "offload_ssd")]
    return [*named, foreign_plan("offload_host", 4, prefetch_layers=0), MIXED, UNUSUAL]


@pytest.mark.parametrize("plan", plans(), ids=lambda p: f"{p.name}-{p.prefetch_layers}")
def test_every_plan_gives_the_bits_of_keep_and_moves_the_formula(plan, make_model, tokens, scripted_stack) -> None:
    reference = train(make_model(), tokens, foreign_plan("keep", 4), None)
    assert equal(train(make_model(), tokens, plan, scripted_stack), reference)
    for direction in Direction:
        expected = input_bytes_moved(plan, INPUT_BYTES, micro_batches=3 * 2, direction=direction)
        assert {m: scripted_stack.moved[direction.value, m] for m in (Medium.host, Medium.ssd)} == expected, direction
    assert not scripted_stack.blobs


def wrong_rng(monkeypatch) -> None:
    monkeypatch.setattr(opaque.RngState, "restore", lambda self: None)


def wrong_layer(monkeypatch) -> None:
    """Every block gets the input of the block behind it."""
    right, taken = Shelf.take, []

    def take(self, owner, blob):
        taken.append(right(self, owner, blob))
        return taken[-2] if len(taken) > 1 else taken[-1]

    monkeypatch.setattr(Shelf, "take", take)


def lost_store(monkeypatch) -> None:
    right = Shelf.put

    def put(self, layer, name, span, x, medium, **kwargs):
        return right(self, layer, name, span, torch.zeros_like(x) if layer == 2 else x, medium, **kwargs)

    monkeypatch.setattr(Shelf, "put", put)


def lost_gradient(monkeypatch) -> None:
    monkeypatch.setattr(opaque.Cell, "backward", lambda self, x, wants_grad, grads: grads[0])


@pytest.mark.parametrize("mutant", [wrong_rng, wrong_layer, lost_store, lost_gradient])
def test_mutants_are_caught(mutant, make_model, tokens, scripted_stack, monkeypatch) -> None:
    reference = train(make_model(), tokens, foreign_plan("keep", 4), None, steps=1)
    mutant(monkeypatch)
    try:
        same = equal(train(make_model(), tokens, foreign_plan("offload_host", 4), scripted_stack, steps=1), reference)
    except (AssertionError, AttributeError, KeyError, RuntimeError):
        same = False
    assert not same


def test_the_order_of_the_verbs(make_model, tokens, scripted_stack) -> None:
    train(make_model(), tokens, ALL_HOST, scripted_stack, steps=1)
    calls = scripted_stack.calls[: len(scripted_stack.calls) // 2]
    forward = ["prepare_store 0", "prepare_store 1", "complete_store 0", "prepare_store 2", "complete_store 1"]
    forward += ["prepare_store 3"]
    # The last two blocks get their inputs from the sources.
    backward = ["prepare_load 3", "prepare_load 2", "complete_load 3", "complete_store 3", "discard 3"]
    backward += ["prepare_load 1", "complete_load 2", "complete_store 2", "discard 2", "prepare_load 0"]
    backward += ["complete_load 1", "discard 1", "complete_load 0", "discard 0"]
    assert [f"{verb} {layer}" for verb, layer in calls] == forward + backward


def test_kept_tail_gives_the_loads_a_head_start(make_model, tokens, scripted_stack) -> None:
    train(make_model(), tokens, MemoryPlan("tail", (HOST, HOST, KEEP, KEEP)), scripted_stack, steps=1)
    verbs = [f"{verb} {layer}" for verb, layer in scripted_stack.calls]
    assert verbs.index("complete_store 1") < verbs.index("prepare_load 1")
    # Both stores are over before the forward pass ends, and the load starts in the backward of block 2.
    assert verbs[: verbs.index("prepare_load 1")] == [
        *("prepare_store 0", "prepare_store 1", "complete_store 0", "complete_store 1")
    ]
    assert verbs.index("prepare_load 0") < verbs.index("complete_load 1")


def test_no_gradients_no_stores(make_model, tokens, scripted_stack) -> None:
    model = make_model().eval()
    with torch.no_grad():
        expected = model(tokens)
        handle = apply_memory(model.blocks, foreign_plan("offload_host", 4), scripted_stack)
        assert torch.equal(model(tokens), expected)
    handle.end()
    assert not scripted_stack.calls


def test_a_failed_load_reaches_the_step_and_abort_clears(make_model, tokens, scripted_stack) -> None:
    model = make_model()
    reference = train(copy.deepcopy(model), tokens, foreign_plan("keep", 4), None, steps=1)
    handle = apply_memory(model.blocks, foreign_plan("offload_host", 4), scripted_stack)
    handle.begin(0)
    scripted_stack.fail_load_of = 1
    with pytest.raises(TransferFailed, match="checksum"):
        model(tokens).backward()
    with pytest.raises(RuntimeError, match="backward pass did not run"):
        handle.end()
    handle.abort()
    handle.end()
    assert not scripted_stack.blobs
    handle.remove()
    scripted_stack.fail_load_of = None
    assert equal(train(model, tokens, foreign_plan("offload_host", 4), scripted_stack, steps=1), reference)


def test_a_forgotten_backward_is_named(make_model, tokens, scripted_stack) -> None:
    model = make_model()
    handle = apply_memory(model.blocks, ALL_HOST, scripted_stack)
    handle.begin(5)
    loss = model(tokens)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2, 3\] are still stored"):
        handle.end()
    with pytest.raises(RuntimeError, match="step 5, micro-batch 0 began twice"):
        handle.begin(5)
    handle.abort()
    with pytest.raises(RuntimeError, match=r"x of layer 3 .* is gone"):
        loss.backward()


def test_a_second_backward_is_refused(make_model, tokens, scripted_stack) -> None:
    model = make_model()
    handle = apply_memory(model.blocks, foreign_plan("offload_host", 4), scripted_stack)
    handle.begin(0)
    loss = model(tokens)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="serves one backward pass"):
        loss.backward()
    handle.end()


def test_two_passes_may_be_open(make_model, tokens, scripted_stack) -> None:
    reference, model = make_model().eval(), make_model().eval()
    (reference(tokens) - reference(tokens.flip(1))).backward()
    handle = apply_memory(model.blocks, MIXED, scripted_stack)
    handle.begin(0, 0)
    first = model(tokens)
    handle.begin(0, 1)
    second = model(tokens.flip(1))
    (first - second).backward()
    handle.end()
    assert equal([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()])


def test_forward_outside_of_a_pass(make_model, tokens) -> None:
    model = make_model()
    apply_memory(model.blocks, foreign_plan("recompute", 4))
    with pytest.raises(RuntimeError, match="begin"):
        model(tokens)


def test_remove_restores_the_blocks(make_model, tokens, scripted_stack) -> None:
    model = make_model()
    names = set(model.state_dict())
    own = model.blocks[1].forward
    model.blocks[1].forward = own
    handle = apply_memory(model.blocks, foreign_plan("offload_host", 4), scripted_stack)
    assert set(model.state_dict()) == names
    with pytest.raises(InputError, match="applied to these blocks already"):
        apply_memory(model.blocks, foreign_plan("recompute", 4))
    handle.remove()
    handle.remove()
    assert "forward" not in model.blocks[0].__dict__
    assert model.blocks[1].__dict__["forward"] is own


def test_bad_plans(make_model) -> None:
    model = make_model()
    with pytest.raises(InputError, match="3 layers, the model has 4"):
        apply_memory(model.blocks, foreign_plan("keep", 3))
    with pytest.raises(InputError, match="no tier is open"):
        apply_memory(model.blocks, MIXED)
    with pytest.raises(InputError, match="memory=auto"):
        foreign_plan("auto", 4)
    with pytest.raises(InputError, match=r"memory=kepe.*choose one of keep"):
        foreign_plan("kepe", 4)


def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handle = apply_memory([block], foreign_plan("recompute", 1))
    handle.begin(0)
    try:
        return block(*args, **kwargs)
    finally:
        handle.remove()


class Named(nn.Module):
    """Takes its input by keyword, returns a tuple with a value that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, *, mask: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        out = self.lin(hidden) * mask
        return out, None, out.argmax(-1)


def test_generic_blocks() -> None:
    block, x, mask = Named(), torch.randn(3, 4), torch.ones(4)
    expected = block(mask=mask, hidden=x)
    expected[0].sum().backward()
    reference, block.lin.weight.grad = block.lin.weight.grad, None
    out = call(block, mask=mask, hidden=x.clone().requires_grad_())
    assert torch.equal(out[0], expected[0])
    assert out[1] is None
    assert torch.equal(out[2], expected[2])
    out[0].sum().backward()
    assert torch.equal(block.lin.weight.grad, reference)


def test_input_without_gradient_still_trains_the_block() -> None:
    block, x = nn.Linear(4, 4), torch.randn(3, 4)
    block(x).sum().backward()
    reference, block.weight.grad = block.weight.grad, None
    call(block, x).sum().backward()
    assert torch.equal(block.weight.grad, reference)


def test_blocks_that_cannot_be_run_again_are_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(InputError, match="2 tensors that carry gradient"):
        call(nn.Bilinear(4, 4, 2), x, x * 2)

    class InPlace(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    with pytest.raises(RuntimeError, match="changed its input in place"):
        call(InPlace(4, 4), x * 1)

    class Listed(nn.Linear):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [super().forward(x)]

    with pytest.raises(TypeError, match="returned a list"):
        call(Listed(4, 4), x)
    with pytest.raises(RuntimeError, match=r"torch.autograd.grad is not possible"):
        torch.autograd.grad(call(nn.Linear(4, 4), x).sum(), x)
    with pytest.raises(InputError, match="without a floating-point tensor"):
        call(nn.Embedding(4, 4), torch.tensor([1]))


def test_input_changed_while_it_is_copied(make_model) -> None:
    model = make_model(num_layers=2)
    stack = open_fake_stack([FakeTier(1024**2, medium=Medium.host)])
    handle = apply_memory(model.blocks, MemoryPlan("host", (HOST,) * 2), stack)
    handle.begin(0)
    x = torch.randn(2, 8, 16, requires_grad=True) * 1
    y = model.blocks[0](x, (torch.ones(16), None))
    x.detach().zero_()
    with pytest.raises(TransferFailed, match=r"l0\.x\.t0-8\.call1: the tensor was changed in place"):
        model.blocks[1](y, (torch.ones(16), None)).sum().backward()
    handle.abort()
    stack._tiers[Medium.host].threads.close()  # a slot is free when the transfer that uses it has ended
    assert stack.stats()[Medium.host].used_bytes == 0
    stack.close()


class CalledTwice(nn.Module):
    """One block that is called twice in a pass: shared weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, table = self.model.embed(tokens), (torch.linspace(0.5, 1.5, 16), None)
        for block in (*self.model.blocks, *self.model.blocks):
            x = block(x, table)
        return self.model.head(x).square().sum()


def test_a_block_that_is_called_again_leaves_blobs_of_its_own(make_model, tokens, scripted_stack) -> None:
    def gradients(plan: MemoryPlan, stack: Any) -> list[torch.Tensor]:
        model = make_model(num_layers=2)
        handle = apply_memory(model.blocks, plan, stack)
        handle.begin(0)
        torch.manual_seed(1)
        loss = CalledTwice(model)(tokens)
        names.update(str(key) for key in (stack.blobs if stack else ()))
        loss.backward()
        handle.end()
        handle.remove()
        return [p.grad for p in model.parameters() if p.grad is not None]

    names: set[str] = set()
    assert equal(gradients(ALL_HOST_2, scripted_stack), gradients(foreign_plan("keep", 2), None))
    assert names == {f"s0.m0.l{(turn - 1) % 2}.x.t0-8.call{turn}" for turn in (1, 2, 3, 4)}
    assert not scripted_stack.blobs


@pytest.mark.parametrize("prefetch_layers", [0, 1, 2])
def test_a_real_stack_forwards_what_the_formula_says_and_logs_the_rest(make_model, tokens, prefetch_layers) -> None:
    log = TransferLog()
    stack = open_fake_stack([FakeTier(1024**2, Faults(delay_s=0.01))], log=log)
    plan = MemoryPlan("ssd", (SSD,) * 4, prefetch_layers=prefetch_layers)
    reference = train(make_model(), tokens, foreign_plan("keep", 4), None, steps=1)
    assert equal(train(make_model(), tokens, plan, stack, steps=1), reference)
    moved = {d: input_bytes_moved(plan, INPUT_BYTES, micro_batches=2, direction=d)[Medium.ssd] for d in Direction}
    assert {d: log.moved_bytes[Medium.ssd, d] for d in Direction} == moved
    assert log.forwarded_bytes[Medium.ssd] == moved[Direction.store] - moved[Direction.load] > 0
    assert sum(record.num_bytes for record in log.records) == sum(moved.values())
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_a_failed_write_of_a_forwarded_blob_is_told(make_model, tokens) -> None:
    faults = Faults()
    stack = open_fake_stack([FakeTier(1024**2, faults)])
    model = make_model(num_layers=2)
    handle = apply_memory(model.blocks, MemoryPlan("ssd", (SSD,) * 2), stack)
    handle.begin(0)
    faults.failed_write = True
    with pytest.raises(TransferFailed, match="Input/output error"):
        model(tokens).backward()
    handle.abort()
    stack._tiers[Medium.ssd].threads.close()  # a slot is free when the transfer that uses it has ended
    assert stack.stats()[Medium.ssd].used_bytes == 0
    stack.close()


def test_autocast_is_replayed(make_model, tokens, scripted_stack) -> None:
    def run(plan: MemoryPlan) -> list[torch.Tensor]:
        model = make_model()
        torch.manual_seed(5)
        handle = apply_memory(model.blocks, plan, scripted_stack)
        handle.begin(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(tokens)
        loss.backward()
        handle.end()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    reference = run(foreign_plan("keep", 4))
    assert equal(run(MIXED), reference)
    assert equal(run(foreign_plan("recompute", 4)), reference)
