"""Tiles of tokens against the function on all tokens in fp64: values, gradients, hooks, what is kept, two ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from headrace.helpers.tolerances import rel_error
from headrace.helpers.training import run_distributed
from headrace.kernels import tiled as tiled_module_file
from headrace.kernels.reference.activation import swiglu
from headrace.kernels.reference.norm import rms_norm
from headrace.kernels.tiled import tile_count_for, tiled, tiled_mlp, tiled_module, tiled_rms_norm
from headrace.workers.job import RankContext
from headrace.workers.parallel.process_group import process_group

WIDTH, INNER = 6, 10
TILES = [1, 4, 7, 21, 100]


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)


@pytest.fixture
def operands(draw) -> list[torch.Tensor]:
    """x (3, 7, WIDTH) and the weights of an MLP, fp64."""
    shapes = (3, 7, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
    return [draw(*shape) for shape in shapes]


def run(call, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and every gradient, for a fixed cotangent."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in operands]
    out = call(*leaves)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("tile", TILES)
def test_mlp_and_norm_against_fp64(check, operands: list[torch.Tensor], tile: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = [tensor.to(dtype) for tensor in operands]
        check("tiled_mlp", lambda *args: tiled_mlp(*args, tile), mlp, given)
        check(
            "tiled_rms_norm",
            lambda x, w: tiled_rms_norm(x, w, 1e-6, tile),
            partial(rms_norm, eps=1e-6),
            [given[0], given[3][:, 0]],
        )


@pytest.mark.parametrize("tile", [2, 100])
def test_gradcheck(operands: list[torch.Tensor], tile: int) -> None:
    leaves = [operands[0][0, :5].clone(), *operands[1:]]
    assert torch.autograd.gradcheck(lambda *args: tiled_mlp(*args, tile), [leaf.requires_grad_() for leaf in leaves])


def test_whole_range_in_one_tile_gives_the_bits_of_the_function(operands: list[torch.Tensor]) -> None:
    given = [tensor.float() for tensor in operands]
    flat = [given[0].flatten(0, 1), *given[1:]]
    for got, expected in zip(run(lambda *args: tiled_mlp(*args, 100), flat), run(mlp, flat), strict=True):
        assert torch.equal(got, expected)


def test_same_tile_same_bits(operands: list[torch.Tensor]) -> None:
    given = [tensor.float() for tensor in operands]
    first, second = (run(lambda *args: tiled_mlp(*args, 4), given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(tiled_mlp(*given, 4), first[0])


def test_parameter_sums_are_fp32_where_the_parameters_are_bf16() -> None:
    """512 tiles that each add 1 + 2^-7: a sum in bf16 would stop growing at 256."""
    x, weight = torch.full((512, 1), 1 + 2.0**-7).bfloat16(), torch.ones(1).bfloat16().requires_grad_()
    tiled(lambda tokens, scale: tokens * scale, x, 1, [weight]).sum().backward()
    assert float(weight.grad) == pytest.approx(516, rel=2**-8)


def test_hooks_fire_once_for_every_parameter(operands: list[torch.Tensor]) -> None:
    x, *weights = operands
    fired: list[int] = []
    for i, weight in enumerate(weights):
        weight.requires_grad_().register_post_accumulate_grad_hook(lambda _, i=i: fired.append(i))
        weight.register_hook(lambda grad, i=i: fired.append(10 + i))
    tiled_mlp(x, *weights, 2).sum().backward()
    assert sorted(fired) == [0, 1, 2, 10, 11, 12]


def test_autograd_keeps_the_input_and_the_parameters_alone(operands: list[torch.Tensor]) -> None:
    leaves = [tensor.requires_grad_() for tensor in operands]
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = tiled_mlp(*leaves, 4)
    assert sorted(kept) == sorted(leaf.untyped_storage().data_ptr() for leaf in leaves)
    out.sum().backward()


def test_backward_runs_again_where_the_graph_is_kept(operands: list[torch.Tensor]) -> None:
    """Nothing is scaled in place, so a second backward is right; without the graph it is refused."""
    leaves = [tensor.requires_grad_() for tensor in operands]
    out = tiled_mlp(*leaves, 4).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_only_the_gradients_that_are_wanted(operands: list[torch.Tensor]) -> None:
    everything = run(lambda *args: tiled_mlp(*args, 4), operands)
    for i in range(4):
        leaves = [tensor.clone().requires_grad_(place == i) for place, tensor in enumerate(operands)]
        out = tiled_mlp(*leaves, 4)
        cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        out.backward(cotangent)
        assert torch.equal(leaves[i].grad, everything[1 + i])
        assert all(leaf.grad is None for place, leaf in enumerate(leaves) if place != i)


def test_parameter_that_is_not_used_gets_zeros(operands: list[torch.Tensor]) -> None:
    x, weight, spare, _ = (tensor.requires_grad_() for tensor in operands)
    tiled(lambda tokens, w, _: F.linear(tokens, w), x, 4, [weight, spare]).sum().backward()
    assert not spare.grad.any()
    assert weight.grad.any()


def test_module_with_biases_and_another_width(draw) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Dropout(0.5), nn.Linear(9, 4)).double()
    x = draw(2, 5, WIDTH)
    with pytest.raises(ValueError, match="2 is dropout in training mode"):
        tiled_module(module, x, 3)
    module.eval()
    given, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    tiled_module(module, given, 3).square().sum().backward()
    got = [given.grad, *(param.grad for param in module.parameters())]
    module.zero_grad()
    module(plain).square().sum().backward()
    expected = [plain.grad, *(param.grad for param in module.parameters())]
    assert max(rel_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-13


def test_autocast_holds_in_backward_too(operands: list[torch.Tensor]) -> None:
    given = [tensor.float() for tensor in operands]
    flat = [given[0].flatten(0, 1), *given[1:]]

    def under(call):
        def inner(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(*args)

        return inner

    got, expected = run(under(lambda *args: tiled_mlp(*args, 100)), flat), run(under(mlp), flat)
    assert got[0].dtype is torch.bfloat16
    assert all(a.dtype is torch.float32 for a in got[1:])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_empty_tiles_change_nothing(operands: list[torch.Tensor], num_tokens: int) -> None:
    given = [operands[0][0, :num_tokens], *operands[1:]]
    calls: list[int] = []

    def counted(tokens: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        return mlp(tokens, *weights)

    found = run(lambda x, *weights: tiled(counted, x, 2, weights, num_tiles=6), given)
    assert calls == 2 * [max(0, min(2, num_tokens - 2 * i)) for i in range(6)]
    for got, expected in zip(found, run(mlp, given), strict=True):
        assert got.shape == expected.shape
        assert rel_error(got, expected) < 1e-13


def test_mutants_are_seen(operands: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameter gradients of the last tile alone, or tiles of a function that is not token-wise."""
    exact = run(mlp, operands)

    def last_alone(sums: list[Any], grads: list[Any]) -> None:
        sums[:] = grads

    monkeypatch.setattr(tiled_module_file, "_add", last_alone)
    found = run(lambda *args: tiled_mlp(*args, 4), operands)
    assert rel_error(found[2], exact[2]) > 0.1
    monkeypatch.undo()

    def centred(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return mlp(x - x.mean(0), *weights)

    tiles = run(lambda x, *weights: tiled(centred, x, 4, weights), [operands[0][0], *operands[1:]])
    assert rel_error(tiles[0], run(centred, [operands[0][0], *operands[1:]])[0]) > 0.1


def test_bad_input_is_named(operands: list[torch.Tensor]) -> None:
    x, gate, up, down = operands
    with pytest.raises(ValueError, match="tile=0"):
        tiled_mlp(x, gate, up, down, 0)
    with pytest.raises(ValueError, match=r"gate, up and down .* do not fit"):
        tiled_mlp(x, gate, up, gate, 4)
    with pytest.raises(ValueError, match=r"x is torch.float32"):
        tiled_mlp(x.float(), gate, up, down, 4)
    with pytest.raises(ValueError, match=r"weight \(10,\): expected \(H,\)"):
        tiled_rms_norm(x, gate[:, 0], 1e-6, 4)
    with pytest.raises(ValueError, match="21 tokens need 6 of 4"):
        tiled_mlp(x, gate, up, down, 4, num_tiles=5)
    with pytest.raises(ValueError, match=r"\(6,\): \(..., tokens, width\)"):
        tiled_mlp(x[0, 0], gate, up, down, 4)
    with pytest.raises(ValueError, match="draws random numbers"):
        tiled(lambda tokens: F.dropout(tokens, 0.5), x, 4)
    with pytest.raises(ValueError, match="keeps the tokens"):
        tiled(lambda tokens: tokens.sum(0, keepdim=True), x, 4)
    with pytest.raises(ValueError, match=r"a \(10, 6\) tensor that needs a gradient: put it in params"):
        tiled(lambda tokens: F.linear(tokens, gate.requires_grad_()), x.requires_grad_(), 4).sum().backward()
    with pytest.raises(ValueError, match="num_tokens=-1"):
        tile_count_for(-1, 4)
    assert [tile_count_for(n, 4) for n in (0, 1, 4, 5)] == [1, 1, 1, 2]


class TiledMLP(nn.Module):
    """What a model does: the tiles are inside the module that FSDP gathers; every tile holds a collective."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights])
        self.tile_sizes: list[int] = []

    def forward(self, x: torch.Tensor, num_tiles: int) -> torch.Tensor:
        def activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            self.tile_sizes.append(len(gate))
            dist.all_reduce(torch.ones(1))
            return swiglu(gate, up)

        return tiled_mlp(x, *self.weights, 2, activation=activation, num_tiles=num_tiles)


def two_ranks(context: RankContext, x: torch.Tensor, weights: list[torch.Tensor], counts: list[int]) -> Any:
    """Gradients, hooks fired and tiles run, on ranks with different numbers of tokens."""
    with process_group(context, torch.device("cpu")):
        model = TiledMLP(weights)
        fully_shard(model, mesh=init_device_mesh("cpu", (context.world_size,)))
        fired: list[int] = []
        for i, param in enumerate(model.parameters()):
            param.register_post_accumulate_grad_hook(lambda _, i=i: fired.append(i))
        mine = x[: counts[0]] if context.rank == 0 else x[counts[0] : sum(counts)]
        num_tiles = tile_count_for(len(mine), 2, dist.group.WORLD)
        # FSDP takes the mean over ranks; the oracle's loss is a sum.
        (model(mine, num_tiles).square().sum() * context.world_size).backward()
        return [param.grad.full_tensor() for param in model.parameters()], fired, model.tile_sizes


@pytest.mark.slow
def test_two_ranks_with_different_numbers_of_tokens_under_fsdp(operands: list[torch.Tensor]) -> None:
    counts = [5, 0]
    x, *weights = operands[0].flatten(0, 1)[: sum(counts)], *operands[1:]
    leaves = [weight.clone().requires_grad_() for weight in weights]
    expected = torch.autograd.grad(mlp(x, *leaves).square().sum(), leaves)
    for rank, (grads, fired, sizes) in enumerate(
        run_distributed(partial(two_ranks, x=x, weights=weights, counts=counts), 2)
    ):
        assert max(rel_error(a, b) for a, b in zip(grads, expected, strict=True)) < 1e-13
        assert sorted(fired) == [0, 1, 2]
        assert sizes == 2 * ([2, 2, 1] if rank == 0 else [0, 0, 0])
