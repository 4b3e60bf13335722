from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headrace.helpers.training import foreign_plan
from headrace.storage.core.errors import DeviceBudgetExceeded, InputError
from headrace.workers.memory.meter import DeviceMeter, open_meter
from headrace.workers.memory.policy import apply_memory


def test_counts_what_autograd_saves_once_per_storage() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with DeviceMeter() as meter:
        y = x.exp()  # saves its output: 128 bytes
        z = y[:2] * y[2:]  # saves two views of the same storage
        assert meter.resident_bytes == y.nbytes == 128
        loss = (z * z).sum()  # saves z: 64 bytes
        assert meter.resident_bytes == 128 + 64
        loss.backward()
        assert meter.resident_bytes == 0
    assert meter.peak_bytes == 192
    meter.reset_peak()
    assert meter.peak_bytes == 0


def test_no_cycle_keeps_a_graph_alive() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with DeviceMeter() as meter:
            y = x.exp().tanh()
            assert meter.resident_bytes == 256
            del y
            assert meter.resident_bytes == 0
    finally:
        gc.enable()


def test_parameters_and_their_views_do_not_count() -> None:
    layer, table = nn.Linear(8, 8, bias=False), torch.randn(8)
    x = torch.randn(4, 8)
    with DeviceMeter(parameters=[table]) as meter:
        y = layer(x) * table
        (y + layer.weight[:4]).sum().backward()
        assert meter.peak_bytes == x.nbytes
    with DeviceMeter() as meter:
        (layer(x) * table).sum().backward()
        assert meter.peak_bytes == x.nbytes + table.nbytes


def test_same_bits_with_and_without(make_model, tokens) -> None:
    model = make_model()
    torch.manual_seed(1)
    model(tokens).backward()
    reference = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with DeviceMeter():
        model(tokens).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), reference, strict=True))


def test_double_backward_through_the_hooks() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    with DeviceMeter():
        (grad,) = torch.autograd.grad(x**3, x, create_graph=True)
        grad.backward()
    assert x.grad == 12


def test_modified_in_place_is_still_an_error() -> None:
    x = torch.randn(4, requires_grad=True)
    with DeviceMeter():
        y = x.exp()
        loss = y.sum()
        y.detach().zero_()
        with pytest.raises(RuntimeError, match="modified in place"):
            loss.backward()


def test_the_budget_is_enforced_where_it_is_passed(make_model, tokens) -> None:
    model = make_model()
    with DeviceMeter() as meter:
        model(tokens).backward()
    peak = meter.peak_bytes
    with DeviceMeter(budget_bytes=peak):
        model(tokens).backward()
    with DeviceMeter(budget_bytes=peak - 1) as small:
        with pytest.raises(DeviceBudgetExceeded) as caught:
            model(tokens).backward()
    message = str(caught.value)
    for part in ("tiers.device.budget_gib", f"gives {peak - 1} bytes", "memory=recompute", "memory=auto"):
        assert part in message
    del caught
    gc.collect()
    assert small.resident_bytes == 0
    handle = apply_memory(model.blocks, foreign_plan("recompute", 4), meter=small)
    handle.begin(0)
    with small:
        model(tokens).backward()
    assert 0 < small.peak_bytes < peak - 1


def test_holds_and_reservations_count() -> None:
    meter = DeviceMeter(budget_bytes=1000)
    x = torch.zeros(100)
    first, second = meter.hold(x), meter.hold(x[:10])
    assert meter.resident_bytes == 400
    first.release()
    first.release()
    assert meter.resident_bytes == 400
    arena = meter.reserve(600)
    with pytest.raises(DeviceBudgetExceeded, match="1001 bytes"):
        meter.reserve(1)
    second.release()
    arena.release()
    assert meter.resident_bytes == 0


def test_offload_peak_is_input_and_one_block(make_model, tokens, scripted_stack) -> None:
    """Eight blocks of offload: the peak is one block's saved tensors and a few inputs, not eight inputs more."""
    peaks = {}
    for name in ("keep", "recompute", "offload_host"):
        for num_layers in (4, 8):
            model = make_model(num_layers=num_layers)
            meter = DeviceMeter()
            handle = apply_memory(model.blocks, foreign_plan(name, num_layers), scripted_stack, meter=meter)
            handle.begin(0)
            with meter:
                model(tokens).backward()
            handle.end()
            assert meter.resident_bytes == 0
            peaks[name, num_layers] = meter.peak_bytes
    x_bytes = 2 * 8 * 16 * 4
    assert peaks["recompute", 8] - peaks["recompute", 4] == 4 * x_bytes
    assert peaks["offload_host", 8] == peaks["offload_host", 4] < peaks["recompute", 4]
    assert peaks["keep", 8] - peaks["keep", 4] > 4 * 5 * x_bytes


def test_no_budget_of_zero() -> None:
    with pytest.raises(InputError, match=r"tiers\.device\.budget_gib"):
        DeviceMeter(budget_bytes=0)
    assert isinstance(open_meter(torch.device("cpu"), 10), DeviceMeter)


@pytest.mark.gpu
def test_cuda_meter_sees_and_enforces() -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(InputError, match="the device has"):
        open_meter(device, 1 << 60)
    meter = open_meter(device, 256 << 20)
    try:
        with meter:
            meter.reset_peak()
            before = meter.peak_bytes
            x = torch.zeros(16 << 20, dtype=torch.uint8, device=device)
            assert meter.peak_bytes - before >= x.nbytes
        with pytest.raises(DeviceBudgetExceeded, match=r"tiers\.device\.budget_gib"):
            with meter:
                torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_layer_norm_saves_input_and_statistics() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    with DeviceMeter() as meter:
        F.layer_norm(x, (5,)).sum().backward()
    # input, mean and reciprocal deviation
    assert meter.peak_bytes == x.nbytes + 2 * 3 * 4
