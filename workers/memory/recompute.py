"""Runs a block without saving anything, and again, with gradients, when its backward is due.

The reentrant form of activation checkpointing (Chen et al. 2016, arXiv 1604.06174): forward runs under no_grad and
leaves only the block's input; backward runs the block again from that input and calls autograd on the piece of graph
that this makes. Dropout masks and autocast casts come out the same because the generator states and the autocast
settings of the forward are put back. The numbers are bit for bit those of a block that kept its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from headrace.workers.memory.layer_inputs import LayerInputs, Pass, StoredInput


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
        inputs / owner / stored: where the layer input waits; stored is None where autograd keeps it on the device.
    """

    run: Callable[[torch.Tensor], Any]
    layer: int
    rng: RngState
    autocast: AutocastState
    inputs: LayerInputs
    owner: Pass
    turn: int
    stored: StoredInput | None

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
                "or a tuple; keep this layer (rest=hbm)"
            )
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        if cell.stored is None:
            ctx.save_for_backward(x)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, None, torch.Tensor | None]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "a plan with recompute runs autograd inside autograd: use loss.backward() without inputs=, "
                "torch.autograd.grad is not possible"
            )
        cell: Cell = ctx.cell
        wants_grad = ctx.needs_input_grad[2]
        if cell.stored is not None:
            with cell.inputs.loaded(cell.owner, cell.stored) as x:
                return None, None, cell.backward(x, wants_grad, grads)
        (x,) = ctx.saved_tensors
        cell.inputs.prefetch(cell.owner, cell.turn)
        return None, None, cell.backward(x, wants_grad, grads)


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
