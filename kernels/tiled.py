"""Token-wise functions in tiles of tokens: forward keeps nothing, backward runs every tile again.

ALST (arXiv 2506.13996) tiles the MLP so; a tile's intermediates are all that is ever there of them. What a tile leaves
for the parameters is added up in fp32, in the order of the tiles, and handed to autograd once, so hooks (gradient
reduction of FSDP and DDP, optimizers in backward) fire once for every parameter and not once for every tile.

Same tile, same bits: two runs, and a run whose input went through another tier, are bit-equal. Another tile is another
order of summation for the parameters' gradients (and may be another kernel for a product).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from headrace.kernels.activation import swiglu
from headrace.kernels.backend import Backend
from headrace.kernels.norm import rms_norm
from headrace.kernels.reference.norm import NormCasting

TokenWise = Callable[..., torch.Tensor]


def tiled(
    fn: TokenWise, x: torch.Tensor, tile: int, params: Sequence[torch.Tensor] = (), *, num_tiles: int | None = None
) -> torch.Tensor:
    """fn(x, *params), one tile of tokens at a time.

    Autograd keeps x and the parameters, nothing of what fn makes. fn must be token-wise: a token's result may depend on
    that token alone (norm, MLP, projection; not attention, not a norm over tokens). It must draw no random numbers,
    since backward runs it again: dropout belongs outside.

    Args:
        fn: takes (n, *inner) tokens, n from 0 to tile, and the parameters; gives (n, *outer). Everything that needs a
            gradient must come through x or params.
        x: (..., T, *inner) with one inner dimension: (B, T, H) or (T, H); the tokens of all leading dimensions are
            tiled as one row of them.
        tile: tokens of a tile; the last one may be ragged.
        params: the tensors that fn takes behind its tokens. Under FSDP2 wrap the module that calls this, not the
            function inside: its parameters are then gathered once, and whole.
        num_tiles: run exactly so many tiles, empty ones at the end; what ranks agree on with `tile_count_for`, where fn
            itself holds a collective. None means as many as there are tokens for, at least one.

    Returns:
        (..., *outer) in fn's dtype.

    Raises:
        ValueError: a tile below 1, x without a dimension for tokens, fewer tiles than the tokens need, a parameter that
            is sharded (a DTensor), an fn that draws random numbers or returns another number of tokens.
    """
    needed = _check(x, tile, params, num_tiles)
    flat = x.reshape(-1, x.shape[-1])
    wants_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *params))
    if wants_grad:
        out = _Tiled.apply(fn, tile, num_tiles or needed, flat, *params)
    else:
        with torch.no_grad():
            out = _forward(fn, tile, num_tiles or needed, flat, params)
    return out.view(*x.shape[:-1], *out.shape[1:])


def tiled_module(module: nn.Module, x: torch.Tensor, tile: int, *, num_tiles: int | None = None) -> torch.Tensor:
    """module(x) for a token-wise module, in tiles; its parameters get their gradients once. See `tiled`.

    Raises:
        ValueError: as `tiled`; dropout in training mode (put the module in eval mode, or the dropout outside).
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            raise ValueError(f"tiled_module: {name or 'module'} is dropout in training mode; tiles cannot replay it")
    names = [name for name, _ in module.named_parameters()]

    def call(tokens: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), (tokens,))

    return tiled(call, x, tile, [param for _, param in module.named_parameters()], num_tiles=num_tiles)


def tiled_mlp(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    up_weight: torch.Tensor,
    down_weight: torch.Tensor,
    tile: int,
    *,
    activation: TokenWise | None = None,
    num_tiles: int | None = None,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """down(activation(gate(x), up(x))) in tiles of tokens: gate, up and their product never exist for all tokens.

    Args:
        x: (..., T, H). gate_weight, up_weight: (F, H). down_weight: (H, F).
        activation: of (gate, up), elementwise. None means swiglu.
        tile, num_tiles: see `tiled`.
        backend: of swiglu.

    Returns:
        (..., T, H).

    Raises:
        ValueError: weights that do not fit x, or as `tiled`.
    """
    weights = (gate_weight, up_weight, down_weight)
    shapes = [tuple(weight.shape) for weight in weights]
    width, inner = x.shape[-1], gate_weight.shape[0]
    if shapes != [(inner, width), (inner, width), (width, inner)]:
        raise ValueError(
            f"tiled_mlp: x {tuple(x.shape)}, gate, up and down {shapes} do not fit: (F, H), (F, H), (H, F)"
        )
    if any(weight.dtype is not x.dtype for weight in weights) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"tiled_mlp: x is {x.dtype}, the weights are {[weight.dtype for weight in weights]}")

    act = functools.partial(swiglu, backend=backend) if activation is None else activation

    def mlp(tokens: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.linear(act(F.linear(tokens, gate), F.linear(tokens, up)), down)

    return tiled(mlp, x, tile, weights, num_tiles=num_tiles)


def tiled_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    tile: int,
    *,
    casting: NormCasting = NormCasting.llama,
    num_tiles: int | None = None,
    backend: Backend = Backend.auto,
) -> torch.Tensor:
    """rms_norm in tiles of tokens: its fp32 copies of x never exist for all tokens, in forward or backward.

    Args:
        x: (..., T, H). weight, eps, casting, backend: see rms_norm.
        tile, num_tiles: see `tiled`.

    Raises:
        ValueError: as rms_norm and `tiled`.
    """

    def norm(tokens: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm(tokens, scale, eps, casting=casting, backend=backend)

    return tiled(norm, x, tile, (weight,), num_tiles=num_tiles)


def tile_count_for(
    num_tokens: int,
    tile: int,
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str = "cpu",
) -> int:
    """Tiles that every rank of a group runs: as many as the rank with most tokens needs, at least one.

    Without a group, what this rank needs. A collective of one number that waits for its result: ask once per batch and
    not once per layer.

    Args:
        num_tokens: of this rank, 0 or more.
        device: where the group's backend needs the number; NCCL: the rank's own GPU.

    Raises:
        ValueError: negative tokens or a tile below 1.
    """
    if num_tokens < 0 or tile < 1:
        raise ValueError(f"num_tokens={num_tokens}, tile={tile}: tokens of at least 0, a tile of at least 1")
    count = max(1, -(-num_tokens // tile))
    if group is None:
        return count
    agreed = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return int(agreed)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fn: TokenWise, tile: int, num_tiles: int, x: torch.Tensor, *params: torch.Tensor
    ) -> torch.Tensor:
        ctx.fn, ctx.tile, ctx.num_tiles = fn, tile, num_tiles
        ctx.autocast = _autocast_of(x.device.type)
        ctx.save_for_backward(x, *params)
        return _forward(fn, tile, num_tiles, x, params)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        dx = torch.empty_like(x) if wanted[0] else None
        sums: list[torch.Tensor | None] = [None] * len(params)
        for rows in _tiles(len(x), ctx.tile, ctx.num_tiles):
            with torch.enable_grad(), torch.autocast(x.device.type, **ctx.autocast):
                leaves = [
                    tensor.detach().requires_grad_(is_wanted)
                    for tensor, is_wanted in zip((x[rows], *params), wanted, strict=True)
                ]
                out = ctx.fn(*leaves)
            if rows.start == 0:
                _check_leaves(out, leaves)
            grads = _gradients(out, leaves, grad[rows])
            if dx is not None:
                dx[rows] = 0.0 if grads[0] is None else grads[0]
            _add(sums, grads[1:])
        return None, None, None, dx, *_as_gradients(sums, params, wanted[1:])


def _forward(fn: TokenWise, tile: int, num_tiles: int, x: torch.Tensor, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """fn over the tiles; runs without autograd."""
    before = _random_states(x.device)
    out: torch.Tensor | None = None
    for rows in _tiles(len(x), tile, num_tiles):
        tokens = x[rows]
        part = fn(tokens, *params)
        if part.shape[:1] != tokens.shape[:1]:
            got = tuple(part.shape)
            raise ValueError(f"tiled: fn made {got} of {tuple(tokens.shape)}; a token-wise function keeps the tokens")
        if out is None:
            out = part.new_empty(len(x), *part.shape[1:])
        out[rows] = part
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(x.device), strict=True)):
        raise ValueError("tiled: fn draws random numbers; backward could not replay them: keep dropout outside")
    assert out is not None
    return out


def _tiles(num_tokens: int, tile: int, num_tiles: int) -> Iterator[slice]:
    """Slices of the tokens, empty ones at the end."""
    for i in range(num_tiles):
        yield slice(min(i * tile, num_tokens), min((i + 1) * tile, num_tokens))


def _gradients(out: torch.Tensor, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Of every leaf that needs one and that `out` depends on."""
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    if not out.requires_grad:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad(out, inputs, grad, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _check_leaves(out: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """Raise where `out` depends on a tensor that needs a gradient and is no leaf of ours: it would get none."""
    known = {id(leaf) for leaf in leaves}
    nodes, seen = [out.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                f"tiled: fn reads a {tuple(variable.shape)} tensor that needs a gradient: put it in params"
            )
        nodes += [parent for parent, _ in node.next_functions]


def _add(sums: list[torch.Tensor | None], grads: Sequence[torch.Tensor | None]) -> None:
    """Add a tile's gradients of the parameters, in fp32 (fp64 for fp64), tile after tile."""
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        so_far = sums[i]
        if so_far is None:
            wide = torch.float64 if grad.dtype is torch.float64 else torch.float32
            # A copy even where the dtype fits: fn may hand out a gradient that is someone else's tensor.
            sums[i] = grad.to(wide, copy=True)
        else:
            so_far.add_(grad)


def _as_gradients(
    sums: Sequence[torch.Tensor | None], params: Sequence[torch.Tensor], wanted: Sequence[bool]
) -> Iterator[torch.Tensor | None]:
    for total, param, is_wanted in zip(sums, params, wanted, strict=True):
        if total is not None:
            yield total.to(param.dtype)
        else:
            yield torch.zeros_like(param) if is_wanted else None


def _autocast_of(device_type: str) -> dict[str, Any]:
    return {
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that fn could draw from; kept on the host, so nothing waits."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a stream that is being captured shows no state
            states.append(torch.cuda.get_rng_state(device))
    return states


def _check(x: torch.Tensor, tile: int, params: Sequence[torch.Tensor], num_tiles: int | None) -> int:
    """How many tiles the tokens need."""
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"tiled: x {tuple(x.shape)}: (..., tokens, width) expected")
    if tile < 1:
        raise ValueError(f"tiled: tile={tile}: at least 1 token")
    needed = max(1, -(-(x.numel() // x.shape[-1]) // tile))
    if num_tiles is not None and num_tiles < needed:
        raise ValueError(f"tiled: num_tiles={num_tiles}: {x.numel() // x.shape[-1]} tokens need {needed} of {tile}")
    for i, param in enumerate(params):
        # A DTensor, known by its mesh: importing its class costs as much as the rest of torch.
        if hasattr(param, "device_mesh"):
            raise ValueError(
                f"tiled: params[{i}] is sharded over {param.device_mesh}; wrap the module that calls tiled"
            )
    return needed
