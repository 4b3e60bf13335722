"""Applies a MemoryPlan to a list of blocks. The one entry into the memory policies.

Only the instance attribute `block.forward` is replaced: parameter names stay, and hooks (FSDP2's sit on `__call__`)
stay outside of what runs again. Order per block call: release old stores, store the input, run without saving.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from headrace.storage.core.errors import InputError
from headrace.workers.memory.layer_inputs import LayerInputs
from headrace.workers.memory.meter import Meter
from headrace.workers.memory.plan import MemoryPlan, Residence
from headrace.workers.memory.recompute import AutocastState, Cell, RngState, run_without_saving

if TYPE_CHECKING:
    from headrace.storage.stack import TierStack

Forward = Callable[..., Any]
CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


class MemoryHandle:
    """A plan at work on a list of blocks. Made by apply_memory."""

    def __init__(self, plan: MemoryPlan, inputs: LayerInputs) -> None:
        self.plan = plan
        self._inputs = inputs
        self._undo: list[Callable[[], None]] = []

    def begin(self, step: int, micro_batch: int = 0) -> None:
        """Open the pass of one micro-batch; call before its forward.

        Raises:
            RuntimeError: the same pass is open and waits for its backward.
        """
        self._inputs.begin(step, micro_batch)

    def end(self) -> None:
        """Close all open passes; call after backward.

        Raises:
            RuntimeError: layer inputs are left in the tiers because a backward did not run.
        """
        left = self._inputs.waiting_layers()
        if left:
            raise RuntimeError(
                f"the inputs of layers {left} are still stored: their backward pass did not run; "
                "run it before end(), or call abort() to drop them"
            )
        self._inputs.close_passes()

    def abort(self) -> None:
        """Drop what an unfinished pass left in the tiers: the way out after an exception."""
        self._inputs.abort()

    def restore_blocks(self) -> None:
        """Give the blocks their own forward back. A backward that is still to come finds what it left in the tiers."""
        while self._undo:
            self._undo.pop()()

    def remove(self) -> None:
        """Restore the blocks and drop what an unfinished pass left. May be called twice."""
        self._inputs.abort()
        self.restore_blocks()

    def waiting_layers(self) -> list[int]:
        """Layers whose input is in a tier because their backward has not run."""
        return self._inputs.waiting_layers()


def apply_memory(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    plan: MemoryPlan,
    stack: TierStack | None = None,
    *,
    meter: Meter | None = None,
) -> MemoryHandle:
    """Make `blocks` obey `plan`, until the handle is removed.

    The layer input is the one tensor argument of a block that carries gradient, the first positional one in our own
    decoder. Other arguments (rope tables, masks) stay where they are. Without gradients enabled a block runs as ever.

    Args:
        blocks: in forward order, one per entry of plan.layers.
        stack: the rank's tiers; needed where the plan sends layer inputs to host or ssd.
        meter: told about layer inputs in flight, which autograd does not know.

    Raises:
        InputError: the plan has another number of layers, needs a stack and there is none, or one is applied already.
    """
    if len(plan.layers) != len(blocks):
        raise InputError(f"the plan {plan.name!r} has {len(plan.layers)} layers, the model has {len(blocks)} blocks")
    moves = any(plan.medium_of(layer) is not None for layer in range(len(blocks)))
    if moves and stack is None:
        raise InputError(f"the plan {plan.name!r} moves layer inputs to host or ssd, and no tier is open")
    if any(getattr(block.forward, "is_memory_policy", False) for block in blocks):
        raise InputError("a memory plan is applied to these blocks already; remove() it first")
    handle = MemoryHandle(plan, LayerInputs(stack, plan.prefetch_layers, meter))
    for layer, (block, layer_plan) in enumerate(zip(blocks, plan.layers, strict=True)):
        if layer_plan.rest is Residence.recompute:
            handle._undo.append(_replace_forward(block, _recomputed(block, layer, plan, handle._inputs)))
        elif moves:
            handle._undo.append(_replace_forward(block, _kept(block, handle._inputs)))
    return handle


def _replace_forward(block: nn.Module, forward: Forward) -> Callable[[], None]:
    own = block.__dict__.get("forward")
    forward.is_memory_policy = True  # type: ignore[attr-defined]
    block.__dict__["forward"] = forward

    def undo() -> None:
        if own is None:
            block.__dict__.pop("forward", None)
        else:
            block.__dict__["forward"] = own

    return undo


def _kept(block: nn.Module, inputs: LayerInputs) -> Forward:
    """A block that keeps its tensors beside blocks that do not: it gives the others' copies their time."""
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        owner = inputs.take_turn()
        turn = owner.turn
        outputs = original(*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if isinstance(first, torch.Tensor) and first.requires_grad:
            # The gradient arrives when this block's backward starts: the time to fetch for the blocks before it.
            first.register_hook(lambda grad: inputs.prefetch(owner, turn))
        return outputs

    return forward


def _recomputed(block: nn.Module, layer: int, plan: MemoryPlan, inputs: LayerInputs) -> Forward:
    """A block that leaves its input only, on the device or in a tier."""
    original, medium = block.forward, plan.medium_of(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        leaves, spec = tree_flatten((args, _without_cache(kwargs, layer)))
        position = _layer_input_position(leaves, layer)
        x = leaves[position]
        if not x.requires_grad and not any(p.requires_grad for p in block.parameters()):
            return original(*args, **kwargs)
        owner = inputs.take_turn()

        def run(layer_input: torch.Tensor) -> Any:
            call_args, call_kwargs = tree_unflatten([*leaves[:position], layer_input, *leaves[position + 1 :]], spec)
            return original(*call_args, **call_kwargs)

        stored = None if medium is None else inputs.store(layer, x, medium)
        leaves[position] = None  # the closure must not keep what the plan sends away
        rng, autocast = RngState.capture(x.device), AutocastState.capture(x.device)
        return run_without_saving(Cell(run, layer, rng, autocast, inputs, owner, owner.turn, stored), x)

    return forward


def _layer_input_position(leaves: list[Any], layer: int) -> int:
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    carrying = [i for i in tensors if leaves[i].requires_grad]
    if len(carrying) > 1:
        shapes = [tuple(leaves[i].shape) for i in carrying]
        raise InputError(
            f"layer {layer} takes {len(carrying)} tensors that carry gradient (shapes {shapes}): recompute and offload "
            "handle blocks with one; keep this layer (memory=keep) or detach the others"
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
