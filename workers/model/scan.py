"""How a scan runs and finds its gradient: a mixer that hands a state from token to token.

    made, state = function(reads, state)                    n tokens of one document at a time
    dreads, dstate = gradient(values, state, dmade, dstate)

A mixer gives the two functions and knows neither documents, nor tiles, nor chunks. The state is zero before the first
token of every document. It is handed from tile to tile and from chunk to chunk, its gradient backwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from headrace.kernels.api import Packing
from headrace.storage.core.errors import InputError
from headrace.workers.model.claims import Needed, check_tensors
from headrace.workers.model.program import Shared, Tensors
from headrace.workers.model.segments import Segment, Span, TensorSpec

ScanFunction = Callable[[Sequence[torch.Tensor], torch.Tensor], tuple[Sequence[torch.Tensor], torch.Tensor]]
ScanGradient = Callable[
    [Mapping[str, torch.Tensor], torch.Tensor, Sequence[torch.Tensor], torch.Tensor],
    tuple[Sequence[torch.Tensor], torch.Tensor],
]


class Piece(NamedTuple):
    """Tokens [begin, end) of some rows that lie in one document. `starts`: it begins there."""

    rows: slice
    span: Span
    starts: bool

    def part(self, span: Span) -> tuple[slice, slice]:
        """Its rows and tokens in a tensor on the tokens of `span`."""
        return self.rows, slice(self.span[0] - span[0], self.span[1] - span[0])


def pieces(packing: Packing | None, batch_size: int, span: Span) -> list[Piece]:
    """Tokens [begin, end) of all rows, cut where documents start, in the order of the tokens of every row.

    Args:
        packing: documents of rows that reach to the end of the span or beyond; None: every row is one document.

    Raises:
        InputError: a document continues another one: its state would begin with that of its prompt.
    """
    if packing is None:
        return [Piece(slice(None), span, span[0] == 0)]
    if packing.parents:
        raise InputError(
            "responses share a prompt, and the model has layers that scan: their state is not handed from a prompt to "
            "several responses; prepare the data with data.share_prompts=false"
        )
    of_rows = [list(_cut(span, row)) for row in _starts(packing.lengths, batch_size)]
    if all(row == of_rows[0] for row in of_rows):
        return [Piece(slice(None), *piece) for piece in of_rows[0]]
    return [Piece(slice(number, number + 1), *piece) for number, row in enumerate(of_rows) for piece in row]


# Asked for every tile of every layer.
@lru_cache(maxsize=16)
def _starts(lengths: tuple[int, ...], batch_size: int) -> list[set[int]]:
    """The first tokens of the documents of every row."""
    row_length = sum(lengths) // batch_size
    starts: list[set[int]] = [set() for _ in range(batch_size)]
    for place in itertools.accumulate(lengths[:-1], initial=0):
        starts[place // row_length].add(place % row_length)
    return starts


def _cut(span: Span, starts: set[int]) -> Iterator[tuple[Span, bool]]:
    borders = [span[0], *sorted(start for start in starts if span[0] < start < span[1]), span[1]]
    return ((piece, piece[0] in starts) for piece in itertools.pairwise(borders))


@dataclass(frozen=True)
class ScanRule:
    """A scan over whole rows. It has no parameters: those of a mixer belong to the segments beside its scan.

    Args:
        function: of what the segment reads beside its state, (B, n, width) each in the order of `reads`, and of the
            state before these tokens, (B, width); neither may be changed. Returns what it makes beside the state, in
            order, and the state behind the tokens.
        gradient: of the values that the segment needs, by name, of the state before, of the gradients of what it made
            and of the gradient of the state behind the tokens. Returns those of what it reads and of the state before.
            None: the function runs again under autograd.
    """

    segment: Segment
    function: ScanFunction
    gradient: ScanGradient | None = None
    params: tuple[str, ...] = ()

    @property
    def state(self) -> TensorSpec:
        """What is handed from token to token."""
        assert self.segment.state is not None, "a skeleton has seen to it"
        return self.segment.state

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of what it reads beside its state."""
        return tuple(name for name in self.segment.reads if name != self.state.name)

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of what it makes beside its state."""
        return tuple(name for name in self.segment.made if name != self.state.name)

    def first_state(self, like: torch.Tensor) -> torch.Tensor:
        """(B, 1, width): the state before the first token of a call. `like`: the block's input."""
        dtype = like.dtype if like.itemsize >= self.state.least_itemsize else torch.float32
        return like.new_zeros(like.shape[0], 1, self.state.width, dtype=dtype)

    def leave(self, state: torch.Tensor) -> None:
        """The state behind the last token of a call, in forward: nobody wants it."""

    def last_gradient(self, like: torch.Tensor) -> torch.Tensor:
        """(B, 1, width): the gradient of the state behind the last token of a call."""
        return torch.zeros_like(ScanRule.first_state(self, like))

    def leave_gradient(self, grad: torch.Tensor) -> None:
        """The gradient of the state before the first token of a call: nobody wants it."""

    def run(self, params: object, values: Tensors, span: Span, shared: Shared) -> Tensors:
        """See Rule. `values`: what the segment reads, the state before the span among it."""
        return self.advance(values, span, shared)[0]

    def advance(self, values: Tensors, span: Span, shared: Shared) -> tuple[Tensors, torch.Tensor]:
        """What the segment makes, and the state behind the span, (B, 1, width)."""
        before = values[self.state.name]
        cut = self._pieces(before, span, shared)
        if len(cut) == 1:
            made, after = self._run(values, before, cut[0], shared)
            return {**made, self.state.name: before}, after
        whole, after = {self.state.name: before}, before.clone()
        for piece in cut:
            part = piece.part(span)
            made, after[piece.rows] = self._run(
                {n: values[n][part] for n in self.reads}, after[piece.rows], piece, shared
            )
            for name, tensor in made.items():
                if name not in whole:
                    whole[name] = tensor.new_empty(len(before), span[1] - span[0], tensor.shape[2])
                whole[name][part] = tensor
        return whole, after

    def backward(self, values: Mapping[str, torch.Tensor], grads: Tensors, span: Span, shared: Shared) -> Tensors:
        """Gradients of what the segment reads, by name; that of its state is of the state before the span.

        Args:
            values: those that the segment needs, on the span.
            grads: of what the segment makes; that of its state is of the state behind the span.
        """
        before, dstate = values[self.state.name], grads[self.state.name].clone()
        found: Tensors = {}
        for piece in reversed(self._pieces(before, span, shared)):
            part, state = piece.part(span), before[piece.rows, 0]
            needed = Needed(
                self.segment,
                shared.draw.layer,
                {n: values[n][part] for n in self.segment.needs if n != self.state.name},
            )
            douts = [grads[name][part] for name in self.makes]
            reads, dbefore = self._back(
                needed, torch.zeros_like(state) if piece.starts else state, douts, dstate[piece.rows, 0]
            )
            # A document knows nothing of the one before it.
            dstate[piece.rows, 0] = 0 if piece.starts else dbefore
            for name, grad in zip(self.reads, reads, strict=True):
                if grad.shape[:2] == (len(before), span[1] - span[0]):
                    found[name] = grad
                    continue
                if name not in found:
                    found[name] = grad.new_empty(len(before), span[1] - span[0], grad.shape[2])
                found[name][part] = grad
        return {**found, self.state.name: dstate}

    def _pieces(self, state: torch.Tensor, span: Span, shared: Shared) -> list[Piece]:
        """Pieces of a span of the call's tokens, by the same numbers."""
        first = shared.draw.token
        found = pieces(shared.packing, len(state), (first + span[0], first + span[1]))
        return [Piece(p.rows, (p.span[0] - first, p.span[1] - first), p.starts) for p in found]

    def _run(self, values: Tensors, state: torch.Tensor, piece: Piece, shared: Shared) -> tuple[Tensors, torch.Tensor]:
        """One piece: what is made beside the state, and the state behind it, (B, 1, width)."""
        reads = [values[name] for name in self.reads]
        before = torch.zeros_like(state[:, 0]) if piece.starts else state[:, 0]
        try:
            made, after = self.function(reads, before)
        except RuntimeError as error:
            where = f"layer {shared.draw.layer}, segment {self.segment.name}"
            stated = f"{self.state.name} is {tuple(before.shape)} of {before.dtype}"
            error.add_note(f"{where}: {stated}; correct the skeleton of the layer's mixer if that is wrong")
            raise
        found = {**dict(zip(self.makes, made, strict=True)), self.state.name: after[:, None]}
        check_tensors(self.segment, self.segment.makes, found, reads[0], reads[0].shape[1], shared.draw.layer)
        return found, found.pop(self.state.name)

    def _back(
        self, values: Mapping[str, torch.Tensor], state: torch.Tensor, grads: list[torch.Tensor], dstate: torch.Tensor
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """One piece. State and gradient of a state are (B, width)."""
        if self.gradient is not None:
            return self.gradient(values, state, grads, dstate)
        with torch.enable_grad():
            reads = [values[name].detach().requires_grad_() for name in self.reads]
            start = state.detach().requires_grad_()
            made, after = self.function(reads, start)
        found = torch.autograd.grad(
            [*made, after], [*reads, start], [*grads, dstate], allow_unused=True, materialize_grads=True
        )
        return found[:-1], found[-1]
