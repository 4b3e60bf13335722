"""The state of a half-done pass of the sweep by chunk, between two chunks of stage 2, and how another process goes on.

Blocks of keys, values and gradients that live in a tier stay there: the state names them. Everything else of the pass
is on the device, and the state holds its tensors:

    kv/L/I, dkv/L/I     blocks in HBM, and those of the chunks at hand, by layer and number
    stateK/L/I          the same for states of scans, of kind K
    gradK/L             gradients of these states
    chosen/L/T, means/L/0   of page-sparse attention: pages chosen for the chunk that begins at token T, mean keys
    sum/L/NAME          sums of parameter gradients, of every block
    total               of the token losses
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.storage.core.keys import BlobKey
from headrace.storage.keeping import dtype_of, name_of
from headrace.workers.memory.chunk_keys import ChunkKeys
from headrace.workers.memory.chunk_states import ChunkStates
from headrace.workers.memory.flow import Carry
from headrace.workers.memory.kv_blocks import BlocksState, KvBlocks


@dataclass(frozen=True)
class PassState:
    """See above.

    Args:
        num_done: chunks of stage 2.
        table: JSON-able: shapes, and which blocks are in a tier.
        keys: of their blobs.
    """

    num_done: int
    table: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    keys: tuple[BlobKey, ...] = ()


class PassRecords(Protocol):
    """Who keeps the states of passes."""

    def take(self) -> PassState | None:
        """The state from which the pass that begins goes on; None: from its beginning."""

    def chunk_done(self, num_done: int, state: Callable[[], PassState]) -> None:
        """So many chunks of stage 2 are done, and not the last one. `state` is called where it is kept."""

    def before_backward(self) -> None:
        """The model's weights have been gathered, and gradients may be put beside them."""


class NoRecords:
    """Nobody keeps them."""

    def take(self) -> PassState | None:
        """See PassRecords."""
        return None

    def chunk_done(self, num_done: int, state: Callable[[], PassState]) -> None:
        """See PassRecords."""

    def before_backward(self) -> None:
        """See PassRecords."""


CHOICE = ("chosen", "means", "counts")


@dataclass(frozen=True)
class PassParts:
    """What a pass of the sweep by chunk consists of."""

    keys: ChunkKeys
    states: ChunkStates
    carries: Sequence[Carry]

    def state(self, num_done: int, total: torch.Tensor) -> PassState:
        """After so many chunks of stage 2; `total`: of the losses so far."""
        shape, kinds = self.keys.shape(), self._kinds()
        table: dict[str, Any] = {
            "keys": None if shape is None else [*shape[:4], name_of(shape[4])],
            "written": list(self.keys.written().items()),
            "states": [None if each is None else [each[0], name_of(each[1])] for each in self.states.shapes()],
        }
        tensors, keys = {"total": total}, []
        for name, blocks in kinds.items():
            found = blocks.state()
            table[name] = [list(place) for place in found.stored]
            keys += [blocks.key(place) for place in found.stored]
            tensors |= {f"{name}/{layer}/{index}": tensor for (layer, index), tensor in found.tensors.items()}
        tensors |= self.keys.choice()
        tensors |= {f"grad{kind}/{layer}": grad for (kind, layer), grad in self.states.gradients().items()}
        for layer, carry in enumerate(self.carries):
            if carry.sums is not None:
                tensors |= {f"sum/{layer}/{name}": each for name, each in carry.sums.state().items()}
        return PassState(num_done, table, tensors, tuple(keys))

    def restore(self, state: PassState, num_tokens: int, device: torch.device) -> None:
        """Go on from there; the pass has begun, and the stack has adopted the blobs.

        Raises:
            ValueError: it is the state of another pass.
        """
        table, shape = state.table, state.table["keys"]
        shapes = [None if each is None else (each[0], dtype_of(each[1])) for each in table["states"]]
        gradients = {(kind, layer): tensor for (kind, layer), tensor in _named(state, "grad", joined=True).items()}
        if shape is not None:
            self.keys.reopen((*shape[:4], dtype_of(shape[4])), dict(table["written"]), device)
            self.keys.restore_choice({n: t for n, t in state.tensors.items() if n.split("/")[0] in CHOICE})
        self.states.reopen(shapes, gradients, num_tokens, device)
        for name, blocks in self._kinds().items():
            places = [(layer, index) for layer, index in table[name]]
            blocks.restore(BlocksState(places, _named(state, name)))
        for layer, carry in enumerate(self.carries):
            prefix = f"sum/{layer}/"
            sums = {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
            carry.restored = sums or None

    def _kinds(self) -> dict[str, KvBlocks]:
        kinds = {f"state{number}": blocks for number, blocks in enumerate(self.states.kinds())}
        return {"kv": self.keys.kv, "dkv": self.keys.grads, **kinds}


def _named(state: PassState, kind: str, *, joined: bool = False) -> dict[tuple[int, int], torch.Tensor]:
    """Tensors KIND/A/B by (A, B); joined: KINDA/B."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for name, tensor in state.tensors.items():
        first, *rest = name.split("/")
        if joined and first.startswith(kind):
            found[int(first.removeprefix(kind)), int(rest[0])] = tensor
        elif first == kind:
            found[int(rest[0]), int(rest[1])] = tensor
    return found
