"""Foreign blocks: a block of which nothing is known but its forward is one segment that is run again from its input.

The reentrant form of activation checkpointing (Chen et al. 2016, arXiv 1604.06174): forward runs under no_grad and
leaves only the block's input; backward runs the block again from that input and calls autograd on the piece of graph
that this makes. Dropout masks and autocast casts come out the same because the generator states and the autocast
settings of the forward are put back. The numbers are bit for bit those of a block that kept its tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from headrace.storage.core.errors import InputError
from headrace.workers.memory.plan import Residence
from headrace.workers.memory.shelf import Pass, Shelf, Ticket

Forward = Callable[..., Any]
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class RngState:
    """States of the CPU generator and, for a CUDA input, of its device's default generator."""

    cpu: torch.Tensor
    cuda_device: torch.device | None = None
    cuda: torch.Tensor | None = None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """The states now."""
        if device.type != "cuda":
            return cls(torch.get_rng_state())
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device))

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and self.cuda_device is not None:
            torch.cuda.set_rng_state(self.cuda, self.cuda_device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw the same numbers again inside; outside, go on as if nothing was drawn."""
        device = self.cuda_device if self.cuda_device is not None else torch.device("cpu")
        now = RngState.capture(device)
        self.restore()
        try:
            yield
        finally:
            now.restore()


@dataclass(frozen=True)
class AutocastState:
    """Autocast settings of the CPU and of the input's device: (device type, enabled, dtype) each."""

    devices: tuple[tuple[str, bool, torch.dtype], ...]
    cache_enabled: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """The settings now."""
        types = dict.fromkeys(("cpu", device.type))
        devices = ((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)
        return cls(tuple(devices), torch.is_autocast_cache_enabled())

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The same settings inside."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.devices:
                stack.enter_context(
                    torch.autocast(device_type, enabled=enabled, dtype=dtype, cache_enabled=self.cache_enabled)
                )
            yield


@dataclass
class Cell:
    """One call of one block, to be run again.

    Args:
        run: the block's own forward as a function of the layer input alone; returns a tensor or a tuple.
        layer: index of the block, for messages.
        shelf / owner / turn: the pass that the call belongs to, and its number in it.
        ticket: of the layer input in its tier; None where autograd keeps it on the device.
    """

    run: Callable[[torch.Tensor], Any]
    layer: int
    rng: RngState
    autocast: AutocastState
    shelf: Shelf
    owner: Pass
    turn: int
    ticket: Ticket | None

    def backward(
        self, x: torch.Tensor, wants_grad: bool, grads: tuple[torch.Tensor | None, ...]
    ) -> torch.Tensor | None:
        """Run the block again on `x`, send `grads` back through it, return the gradient of `x`.

        Gradients of parameters accumulate on the way, inside the nested call of autograd.
        """
        x = x.detach().requires_grad_(wants_grad)
        with torch.enable_grad(), self.rng.replayed(), self.autocast.replayed():
            outputs = self.run(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if len(outputs) != len(grads):
            raise RuntimeError(
                f"layer {self.layer} returned {len(grads)} values in forward, {len(outputs)} when run again"
            )
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grads, strict=True)
            if grad is not None and isinstance(out, torch.Tensor) and out.requires_grad
        ]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return x.grad


class _Recompute(torch.autograd.Function):
    """apply(cell, anchor, x): anchor is an empty tensor that requires grad where x does not, else None."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, anchor: torch.Tensor | None, x: torch.Tensor) -> Any:
        version = x._version
        outputs = cell.run(x)
        if x._version != version:
            raise RuntimeError(f"layer {cell.layer} changed its input in place: it cannot be run again from it")
        if not isinstance(outputs, torch.Tensor | tuple):
            raise TypeError(
                f"layer {cell.layer} returned a {type(outputs).__name__}: recompute takes blocks that return a tensor "
                "or a tuple; keep or move what this layer saves (saved=hbm, host or ssd)"
            )
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        if cell.ticket is None:
            ctx.save_for_backward(x)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, torch.Tensor | None]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "a plan with recompute runs autograd inside autograd: use loss.backward() without inputs=, "
                "torch.autograd.grad is not possible; a plan that keeps or moves what the blocks save allows it"
            )
        cell: Cell = ctx.cell
        wants_grad = ctx.needs_input_grad[2]
        cell.shelf.prefetch(cell.owner, cell.turn)
        if cell.ticket is None:
            (x,) = ctx.saved_tensors
            return None, None, cell.backward(x, wants_grad, grads)
        x, hold = cell.ticket.take()
        try:
            return None, None, cell.backward(x, wants_grad, grads)
        finally:
            if hold is not None:
                hold.release()


def run_without_saving(cell: Cell, x: torch.Tensor) -> Any:
    """Run the cell now, keep its input where the cell says, and run it again in backward.

    Returns:
        What the block returns: a tensor or a tuple.

    Raises:
        RuntimeError: the block changed its input in place; or, in backward, the input is gone or autograd was
            called in a way that cannot nest.
        TypeError: the block returned neither a tensor nor a tuple.
    """
    anchor = None if x.requires_grad else torch.empty(0, device=x.device, requires_grad=True)
    return _Recompute.apply(cell, anchor, x)


def kept(block: nn.Module, shelf: Shelf) -> Forward:
    """The forward of a block that keeps its tensors beside blocks that do not: it starts the others' loads in time."""
    original = block.forward
    take_turn, prefetch = torch.compiler.disable(shelf.take_turn), torch.compiler.disable(shelf.prefetch)

    @torch.compiler.disable(recursive=False)  # the block itself may be compiled
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        owner, turn = take_turn()
        outputs = original(*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if isinstance(first, torch.Tensor) and first.requires_grad:
            # The gradient arrives when this block's backward starts: the time to fetch for the blocks before it.
            first.register_hook(lambda grad: prefetch(owner, turn))
        return outputs

    return forward


def recomputed(block: nn.Module, layer: int, residence: Residence, shelf: Shelf) -> Forward:
    """The forward of a block that leaves its input only, on the device or in a tier."""
    original, medium = block.forward, residence.medium

    @torch.compiler.disable  # run again in backward, it would not be compiled: then not in forward either
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        leaves, spec = tree_flatten((args, _without_cache(kwargs, layer)))
        position = _layer_input_position(leaves, layer)
        x = leaves[position]
        if not x.requires_grad and not any(p.requires_grad for p in block.parameters()):
            return original(*args, **kwargs)
        owner, turn = shelf.take_turn()

        def run(layer_input: torch.Tensor) -> Any:
            call_args, call_kwargs = tree_unflatten([*leaves[:position], layer_input, *leaves[position + 1 :]], spec)
            return original(*call_args, **call_kwargs)

        num_rows = x.shape[-2] if x.dim() > 1 else x.numel()
        ticket = None if medium is None else shelf.put_for_graph(layer, "x", (0, num_rows), x, medium)
        shelf.count_sources(owner, turn)
        leaves[position] = None  # the closure must not keep what the plan sends away
        rng, autocast = RngState.capture(x.device), AutocastState.capture(x.device)
        return run_without_saving(Cell(run, layer, rng, autocast, shelf, owner, turn, ticket), x)

    return forward


def _layer_input_position(leaves: list[Any], layer: int) -> int:
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    carrying = [i for i in tensors if leaves[i].requires_grad]
    if len(carrying) > 1:
        shapes = [tuple(leaves[i].shape) for i in carrying]
        raise InputError(
            f"layer {layer} takes {len(carrying)} tensors that carry gradient (shapes {shapes}): recompute takes "
            "blocks with one; keep or move what this layer saves (saved=hbm, host or ssd), or detach the others"
        )
    floating = [i for i in tensors if leaves[i].is_floating_point()]
    if not (carrying or floating):
        raise InputError(f"layer {layer} was called without a floating-point tensor: there is no layer input to keep")
    return (carrying or floating)[0]


def _without_cache(kwargs: dict[str, Any], layer: int) -> dict[str, Any]:
    """The arguments of a Hugging Face block without its KV cache: run twice, a block would append to it twice."""
    caches = [name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None]
    if not caches:
        return kwargs
    for name in caches:
        length = getattr(kwargs[name], "get_seq_length", lambda _: 1)(layer)
        if length:
            raise InputError(f"{name} holds {length} tokens: a recomputed block cannot run behind a filled KV cache")
    warnings.warn("use_cache=True has no use in a pass with gradients: recomputed blocks run without it", stacklevel=3)
    return {**kwargs, **dict.fromkeys(caches), **({"use_cache": False} if "use_cache" in kwargs else {})}
