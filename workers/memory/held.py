"""What one call of a block left for its backward: on the device or on the shelf, by tensor and span of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from headrace.workers.memory.meter import Hold
from headrace.workers.memory.plan import LayerPlan
from headrace.workers.memory.rebuild import Spans, merge, subtract
from headrace.workers.memory.shelf import Blob, Pass, Shelf
from headrace.workers.model.skeleton import Span


@dataclass
class Entry:
    """One span of one tensor: its rows on the device, or the blob that holds them.

    Args:
        in_buffer: the blob is loaded into the buffer of the whole tensor.
    """

    span: Span
    tensor: torch.Tensor | None
    blob: Blob | None = None
    hold: Hold | None = None
    in_buffer: bool = False


class Held:
    """Tensors are (B, n, width), n tokens of the sequence.

    Args:
        layer: index of the block.
        plan: its layer plan.
        num_tokens: T, of the whole sequence.
        shelf, owner: take what leaves the device; owner is the pass that the call belongs to.
        read_whole: tensors that backward reads on all tokens at once.
    """

    def __init__(
        self, layer: int, plan: LayerPlan, num_tokens: int, shelf: Shelf, owner: Pass, read_whole: frozenset[str]
    ) -> None:
        self._layer, self._plan, self._num_tokens, self._read_whole = layer, plan, num_tokens, read_whole
        self._shelf, self._owner = shelf, owner
        self._entries: dict[str, list[Entry]] = {}
        self._buffers: dict[str, tuple[torch.Tensor, Spans]] = {}

    def put(self, name: str, span: Span, tensor: torch.Tensor, *, use: int) -> None:
        """Place the rows of a tensor on these tokens as the plan says; what it recomputes is dropped.

        Args:
            use: when backward uses it among the tensors of the block; orders the loads.
        """
        for stretch in self._plan.stretches.get(name, ()):
            low, high = stretch.span(self._num_tokens)
            begin, end = max(low, span[0]), min(high, span[1])
            if begin >= end or not (stretch.residence.medium or stretch.residence.value == "hbm"):
                continue
            part = tensor.detach()[:, begin - span[0] : end - span[0]]
            entry = Entry((begin, end), part)
            if stretch.residence.medium is not None:
                entry.tensor = None
                into = functools.partial(self._into, name, entry, part.shape[2], part.dtype, part.device)
                # With several sequences the rows of a span are not contiguous in the whole tensor.
                entry.blob = self._shelf.put(
                    self._layer,
                    name,
                    entry.span,
                    part,
                    stretch.residence.medium,
                    use=use,
                    into=into if part.shape[0] == 1 and name in self._read_whole else None,
                )
            elif (begin, end) != span:
                entry.tensor = part.clone()  # a view would keep the rows alive that leave
            self._entries.setdefault(name, []).append(entry)

    def add(self, name: str, span: Span, tensor: torch.Tensor) -> None:
        """Hold rows that were made again, on the device."""
        if span == (0, self._num_tokens):
            self._entries.setdefault(name, []).append(Entry(span, tensor))
        else:
            self._write(name, span, tensor)

    def spans(self) -> dict[str, Spans]:
        """The tokens of every tensor that are held, by name."""
        return {name: self.spans_of(name) for name in dict.fromkeys((*self._entries, *self._buffers))}

    def spans_of(self, name: str) -> Spans:
        """The tokens of one tensor that are held."""
        entries = self._entries.get(name, ())
        if len(entries) == 1 and name not in self._buffers:
            return (entries[0].span,)
        return merge((*(entry.span for entry in entries), *self._filled(name)))

    def get(self, name: str, span: Span) -> torch.Tensor:
        """The rows of a tensor on these tokens; they stay held until dropped.

        What several entries hold is brought together in one buffer: it was loaded there, or it is copied there.

        Raises:
            KeyError: some of them are not held.
        """
        if not subtract((span,), self._filled(name)):
            return self._buffers[name][0][:, slice(*span)]
        for entry in self._entries.get(name, ()):
            if entry.span[0] <= span[0] and span[1] <= entry.span[1]:
                first = entry.span[0]
                return self._rows(entry)[:, span[0] - first : span[1] - first]
        for entry in list(self._overlapping(name, span)):
            rows = self._rows(entry)
            if entry.in_buffer:
                self._fill(name, entry.span)
            else:
                self._write(name, entry.span, rows)
            self._remove(name, entry)
        if missing := subtract((span,), self._filled(name)):
            raise KeyError(f"layer {self._layer}: {name} is not held on tokens {missing}")
        return self._buffers[name][0][:, slice(*span)]

    def drop(self, name: str, span: Span | None = None) -> None:
        """Let go of a tensor, or of the entries that lie within a span."""
        low, high = span or (0, self._num_tokens)
        for entry in [e for e in self._entries.get(name, ()) if low <= e.span[0] and e.span[1] <= high]:
            self._remove(name, entry)
        if span is None:
            self._entries.pop(name, None)
            self._buffers.pop(name, None)

    def claim(self) -> None:
        """Tell the meter what stays on the device, now that the block itself no longer counts it."""
        for entry in self._on_device():
            assert entry.tensor is not None
            entry.hold = self._shelf.claim(entry.tensor)

    def release(self) -> None:
        """Take the claims back: the block counts them again."""
        for entry in self._on_device():
            if entry.hold is not None:
                entry.hold.release()

    def _on_device(self) -> Iterator[Entry]:
        return (entry for row in self._entries.values() for entry in row if entry.tensor is not None)

    def _rows(self, entry: Entry) -> torch.Tensor:
        if entry.tensor is None:
            assert entry.blob is not None
            entry.tensor = self._shelf.take(self._owner, entry.blob)
        return entry.tensor

    def _remove(self, name: str, entry: Entry) -> None:
        self._entries[name].remove(entry)

    def _overlapping(self, name: str, span: Span) -> Iterator[Entry]:
        return (e for e in self._entries.get(name, ()) if e.span[0] < span[1] and span[0] < e.span[1])

    def _filled(self, name: str) -> Spans:
        return self._buffers[name][1] if name in self._buffers else ()

    def _into(
        self, name: str, entry: Entry, width: int, dtype: torch.dtype, device: torch.device, at_work: bool
    ) -> torch.Tensor | None:
        """The rows of the whole tensor's buffer that a blob is loaded into; None: it gets memory of its own.

        None for a blob that is the whole tensor. Before the block is at work the buffer is made only if the blobs fill
        it: then it takes no more than they do.
        """
        all_tokens = ((0, self._num_tokens),)
        blobs = merge(e.span for e in self._entries[name] if e.blob is not None)
        if entry.span == all_tokens[0] or (not at_work and subtract(all_tokens, blobs)):
            return None
        if name not in self._buffers:
            self._buffers[name] = torch.empty(1, self._num_tokens, width, dtype=dtype, device=device), ()
        entry.in_buffer = True
        return self._buffers[name][0][:, slice(*entry.span)]

    def _write(self, name: str, span: Span, tensor: torch.Tensor) -> None:
        if name not in self._buffers:
            self._buffers[name] = tensor.new_empty(tensor.shape[0], self._num_tokens, tensor.shape[2]), ()
        self._buffers[name][0][:, slice(*span)] = tensor
        self._fill(name, span)

    def _fill(self, name: str, span: Span) -> None:
        buffer, filled = self._buffers[name]
        self._buffers[name] = buffer, merge((*filled, span))
