"""Foreign blocks that run once: what autograd saves inside them leaves the device and comes back for their backward.

SSDTrain (arXiv 2408.10013) on any block. torch.autograd.graph.saved_tensors_hooks hands every tensor that autograd
saves to `pack`, and asks `unpack` for it.

forward   A storage has a number from the time when it is first seen; while the block runs the call holds it, so its
          address means nothing else. When the block is done, the bytes that its saved tensors span become one blob.
          Views, slices, transposed and expanded tensors of it are notes on how to make them again.
backward  The first unpack of a block starts its loads and those of the blocks before it. A storage that came back is
          freed when autograd has let go of its tensors; over a retained graph a second backward finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from headrace.storage.core.ledger import PAGE_BYTES
from headrace.storage.core.records import Medium
from headrace.workers.memory.meter import Hold
from headrace.workers.memory.opaque import Forward
from headrace.workers.memory.shelf import Shelf, Ticket

# Blobs begin at multiples of this in their storage: a tensor of any dtype is aligned in them.
ALIGNMENT = 16
# A cast, a transpose, a view: so many operations lie between a weight and what counts as one.
CAST_STEPS = 4


class Place:
    """Where one storage waits: on the device, or in a blob.

    Args:
        name: of the blob.
        medium: where it goes when the block is done; None: it stays.
    """

    def __init__(self, name: str, medium: Medium | None, storage: torch.UntypedStorage) -> None:
        self.name, self.medium = name, medium
        self._storage: torch.UntypedStorage | None = storage
        self._ticket: Ticket | None = None
        self._begin, self._end, self._last = storage.nbytes(), 0, 0
        self._hold: Hold | None = None
        self._shift = 0  # from the bytes of the block's storage to those of the loaded one

    def cover(self, begin: int, end: int, number: int) -> None:
        """A saved tensor, the call's so many, spans these bytes."""
        self._begin = min(self._begin, begin // ALIGNMENT * ALIGNMENT)
        self._end, self._last = max(self._end, end), number

    def leave(self, shelf: Shelf, layer: int) -> None:
        """The block is done: the bytes go where they are to go, if they fill a page."""
        assert self._storage is not None
        num_bytes = self._end - self._begin
        # A version of its own: it is unpack that tells of changes in place, when autograd would.
        source = torch.empty(0, dtype=torch.uint8, device=self._storage.device)
        source.set_(self._storage, self._begin, (num_bytes,), (1,))
        if self.medium is None or num_bytes < PAGE_BYTES:
            self._hold = shelf.claim(source)
            return
        # Backward uses the tensors in reverse.
        self._ticket = shelf.put_for_graph(layer, self.name, (0, num_bytes), source, self.medium, use=-self._last)
        self._storage = None

    def view(self, dtype: torch.dtype, begin: int, size: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
        """A tensor over the bytes; begin: where it began in the block's storage, in bytes."""
        if self._storage is None:
            assert self._ticket is not None
            loaded, self._hold = self._ticket.take()
            self._storage, self._shift = loaded.untyped_storage(), int(loaded.storage_offset()) - self._begin
        offset = (begin + self._shift) // dtype.itemsize
        return torch.empty(0, dtype=dtype, device=self._storage.device).set_(self._storage, offset, size, stride)


@dataclass(eq=False)
class Saved:
    """What autograd holds in place of a tensor that it saved.

    Args:
        witness: has the tensor's version counter and, unless the tensor stays, no memory.
        version: at the time when it was saved.
        place: of its bytes; None: the witness is the tensor, which stays.
    """

    call: Call
    witness: torch.Tensor
    version: int
    size: torch.Size
    place: Place | None = None
    begin: int = 0
    stride: tuple[int, ...] = ()


class Call:
    """One call of a block: gives autograd notes for tensors, and tensors for notes.

    Args:
        layer: index of the block, for messages.
        media: where the input "x" and the other "saved" tensors go; None: they stay.
        arguments: tensors. Those that carry gradient are the input, or the first floating-point one; the others stay.
    """

    def __init__(
        self,
        block: nn.Module,
        layer: int,
        media: Mapping[str, Medium | None],
        shelf: Shelf,
        arguments: Sequence[torch.Tensor],
    ) -> None:
        self._layer, self._media, self._shelf, self._turn = layer, media, shelf, shelf.take_turn()
        weights = [p for p in (*block.parameters(), *block.buffers()) if not hasattr(p, "to_local")]  # no DTensors
        self._frozen = {p.shape for p in block.parameters() if not p.requires_grad}
        inputs = [t for t in arguments if t.requires_grad] or [t for t in arguments if t.is_floating_point()][:1]
        self._inputs = {x.untyped_storage()._cdata for x in inputs}
        self._staying = {t.untyped_storage()._cdata for t in (*weights, *arguments)} - self._inputs
        self._device = next((t.device for t in (*inputs, *weights)), torch.device("cpu"))
        self._places: dict[int, Place] = {}
        self._count = 0
        self._is_done = self._is_prefetched = False

    @_disable_dynamo
    def pack(self, tensor: torch.Tensor) -> Saved:
        """Autograd saves a tensor."""
        # Detached: an operation that saves its own result would otherwise hold itself.
        witness = tensor.detach()
        if not self._may_leave(tensor):
            return Saved(self, witness, tensor._version, tensor.shape)
        storage = tensor.untyped_storage()
        place = self._places.get(storage._cdata)
        if place is None:
            name = "x" if storage._cdata in self._inputs else "saved"
            number = len(self._places)
            place = Place("x" if name == "x" else f"saved{number}", self._media[name], storage)
            self._places[storage._cdata] = place
        begin, stride = int(tensor.storage_offset()) * tensor.itemsize, tensor.stride()
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, stride, strict=True))
        self._count += 1
        place.cover(begin, begin + extent * tensor.itemsize, self._count)
        witness.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return Saved(self, witness, tensor._version, tensor.shape, place, begin, stride)

    @_disable_dynamo
    def finish(self) -> None:
        """The block is done: from now on a storage is known by its place, and its bytes leave."""
        places, self._places = self._places, {}
        for place in places.values():
            place.leave(self._shelf, self._layer)
        self._shelf.count_sources(*self._turn)
        self._is_done = True

    @_disable_dynamo
    def unpack(self, saved: Saved) -> torch.Tensor:
        """Autograd wants a tensor back.

        Raises:
            RuntimeError: it was changed in place since it was saved. Hooks switch autograd's own check off.
        """
        if self._is_done and not self._is_prefetched:
            self._is_prefetched = True
            self._shelf.prefetch(*self._turn)
        if saved.witness._version != saved.version:
            raise RuntimeError(
                f"layer {self._layer}: one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(saved.size)} is at version {saved.witness._version}; "
                f"expected version {saved.version} instead"
            )
        if saved.place is None:
            return saved.witness
        return saved.place.view(saved.witness.dtype, saved.begin, saved.size, saved.stride)

    def _may_leave(self, tensor: torch.Tensor) -> bool:
        """Plain dense activations may. What is there in any case, weights above all, and what hides its bytes stays."""
        if type(tensor) is not torch.Tensor or tensor.device != self._device or tensor.numel() == 0:
            return False
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return False
        return tensor.untyped_storage()._cdata not in self._staying and not self._is_weight(tensor)

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether it is a view or a cast of a weight. Autocast holds its casts as long as it is on, and FSDP shows the
        weights of a module inside the block only while that runs."""
        if isinstance(tensor._base, nn.Parameter):
            return True
        weight, node = None, tensor.grad_fn
        if node is None and tensor.is_floating_point() and self._frozen & {tensor.shape, tensor.shape[::-1]}:
            return True
        for _ in range(CAST_STEPS):
            before = () if node is None else [n for n, _ in node.next_functions if n is not None]
            if len(before) == 1:
                node = before[0]
                weight = getattr(node, "variable", weight)
        return isinstance(weight, nn.Parameter) and tensor.shape in (weight.shape, weight.shape[::-1])


def offloaded(block: nn.Module, layer: int, media: Mapping[str, Medium | None], shelf: Shelf) -> Forward:
    """The forward of a block that runs once, and whose input and other saved tensors go to these media."""
    original = block.forward

    @torch.compiler.disable(recursive=False)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        call = start(args, kwargs)
        with torch.autograd.graph.saved_tensors_hooks(call.pack, call.unpack):
            outputs = original(*args, **kwargs)
        call.finish()
        return outputs

    @torch.compiler.disable
    def start(args: Any, kwargs: Any) -> Call:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        return Call(block, layer, media, shelf, tensors)

    return forward
