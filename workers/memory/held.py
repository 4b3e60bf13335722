"""What one call of a block left for its backward: on the device or on the shelf, by tensor and span of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.api import CodecName, decode_rows, derive_seed, encode_rows
from headrace.storage.core.ledger import PIECE_BYTES, round_up
from headrace.workers.memory.meter import Hold
from headrace.workers.memory.rebuild import Spans, merge, subtract
from headrace.workers.memory.schedule import BlobSpec, Placing, Schedule
from headrace.workers.memory.shelf import Blob, Into, Pass, Shelf
from headrace.workers.model.skeleton import Skeleton, Span

# Of a codec's random numbers: the tensor's place above, the tile's first token below.
STREAM_BITS = 26


class Pack:
    """Tensors (B, n, width) that lie in one piece of memory, because they leave as one blob."""

    def __init__(self, spec: BlobSpec, skeleton: Skeleton, like: torch.Tensor) -> None:
        self._parts: dict[str, tuple[int, int, torch.Size, torch.dtype]] = {}
        end = 0
        for tensor in (skeleton.tensors[name] for name in spec.names):
            width, dtype = tensor.width, like.dtype if like.itemsize >= tensor.least_itemsize else torch.float32
            if tensor.name in skeleton.coded:
                width, dtype = skeleton.held_bytes(tensor.name, like.itemsize), torch.uint8
            shape = torch.Size((like.shape[0], tensor.num_rows(spec.span), width))
            begin = round_up(end, PIECE_BYTES)
            end = begin + shape.numel() * dtype.itemsize
            self._parts[tensor.name] = (begin, end, shape, dtype)
        self.memory: torch.Tensor | None = torch.empty(end, dtype=torch.uint8, device=like.device)
        self.views = self._views(self.memory)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy those in that were not written there."""
        for name, view in self.views.items():
            if tensors[name].data_ptr() != view.data_ptr():
                view.copy_(tensors[name])

    def leave(self) -> torch.Tensor:
        """The memory; nothing here keeps it any more."""
        assert self.memory is not None, "a pack leaves once"
        memory, self.memory, self.views = self.memory, None, {}
        return memory

    def back(self, memory: torch.Tensor) -> None:
        """The bytes are there again."""
        self.views = self._views(memory)

    def _views(self, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: memory[begin:end].view(dtype).view(shape) for name, (begin, end, shape, dtype) in self._parts.items()
        }


@dataclass
class Entry:
    """One span of one tensor: its rows on the device, or the blob that holds them.

    Args:
        pack: of the blob, where it holds other tensors too.
        in_buffer: the blob is loaded into the buffer of the whole tensor.
    """

    span: Span
    tensor: torch.Tensor | None
    blob: Blob | None = None
    pack: Pack | None = None
    hold: Hold | None = None
    in_buffer: bool = False


class Held:
    """Tensors are (B, n, width), n tokens of the sequence.

    Args:
        layer: index of the block.
        together: whole tensors that leave in one blob with others: they are written where it will be, tile after tile.
        schedule: of its work.
        shelf, owner: take what leaves the device; owner is the pass that the call belongs to.
        x: the block's input; its shape, dtype and device.
    """

    def __init__(
        self,
        layer: int,
        together: Mapping[str, BlobSpec],
        schedule: Schedule,
        shelf: Shelf,
        owner: Pass,
        x: torch.Tensor,
    ) -> None:
        self._layer, self._together, self._schedule, self._num_tokens = layer, together, schedule, x.shape[1]
        self._shelf, self._owner = shelf, owner
        self._like = x.new_empty(x.shape[0], 0)
        self._entries: dict[str, list[Entry]] = {}
        self._buffers: dict[str, tuple[torch.Tensor, Spans]] = {}
        self._packs: dict[BlobSpec, Pack] = {}
        self._codec = schedule.skeleton.codec
        self._seed: int | None = None

    def room(self, name: str) -> torch.Tensor | None:
        """Where a tensor of all tokens is to be written because it leaves beside others; None: anywhere."""
        spec = self._together.get(name)
        return None if spec is None else self._pack(spec).views[name]

    def put(self, span: Span, placing: Placing, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Place the rows on these tokens of tensors that were made together.

        Returns:
            Those that lie in other memory now, by name: go on with them, so that the old memory is free. What is in the
            codec is not among them: forward goes on with the exact values.
        """
        coded: dict[str, torch.Tensor] = {}
        if self._codec is not None:
            coded = self._encoded(self._codec, span, placing, tensors)
            tensors = {**tensors, **coded}
        for name, part in placing.stays:
            rows = _rows_of(tensors[name], span, part)
            # A view would keep the rows alive that leave.
            entry = Entry(part, rows if part == span else rows.clone())
            self._entries.setdefault(name, []).append(entry)
        moved: dict[str, torch.Tensor] = {}
        for spec in placing.blobs:
            if len(spec.names) == 1:
                self._send(spec, _rows_of(tensors[spec.names[0]], span, spec.span))
            else:
                moved |= self._send_together(spec, tensors)
        return {name: rows for name, rows in moved.items() if name not in coded}

    def _encoded(
        self, codec: CodecName, span: Span, placing: Placing, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """In the codec, those that are placed and have one."""
        skeleton, owner = self._schedule.skeleton, self._owner
        names = {name for name, _ in placing.stays}.union(*(blob.names for blob in placing.blobs)) & skeleton.coded
        if names and self._seed is None:
            self._seed = derive_seed(owner.seed, owner.step, self._layer, owner.row)
        found = {}
        for name in sorted(names):
            stream = skeleton.skeletal.index(name) << STREAM_BITS | span[0]
            found[name] = encode_rows(codec, tensors[name], seed=self._seed or 0, stream=stream)
        return found

    def _send(self, spec: BlobSpec, rows: torch.Tensor) -> None:
        (name,) = spec.names
        entry = Entry(spec.span, None)
        into = functools.partial(self._into, name, entry, rows.shape[2], rows.dtype, rows.device)
        # With several sequences the rows of a span are not contiguous in the whole tensor.
        is_direct = rows.shape[0] == 1 and name in self._schedule.read_whole
        entry.blob = self._store(spec, rows, into=into if is_direct else None)
        self._entries.setdefault(name, []).append(entry)

    def _send_together(self, spec: BlobSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pack = self._pack(spec)
        del self._packs[spec]
        pack.fill(tensors)
        views = pack.views
        blob = self._store(spec, pack.leave())
        for name in spec.names:
            self._entries.setdefault(name, []).append(Entry(spec.span, None, blob, pack))
        return views

    def _store(self, spec: BlobSpec, tensor: torch.Tensor, into: Into | None = None) -> Blob:
        use = min(self._schedule.use[name] for name in spec.names)
        return self._shelf.put(self._layer, spec.name, spec.span, tensor, spec.medium, use=use, into=into)

    def _pack(self, spec: BlobSpec) -> Pack:
        pack = self._packs.get(spec)
        if pack is None:
            pack = self._packs[spec] = Pack(spec, self._schedule.skeleton, self._like)
        return pack

    def add(self, name: str, span: Span, tensor: torch.Tensor) -> None:
        """Hold rows that were made again, on the device."""
        if span == (0, self._num_tokens):
            self._entries.setdefault(name, []).append(Entry(span, tensor))
        else:
            self._write(name, span, tensor)

    def get(self, name: str, span: Span) -> torch.Tensor:
        """The rows of a tensor on these tokens; they stay held until dropped.

        What several entries hold is brought together in one buffer: it was loaded there, or it is copied there.

        Raises:
            KeyError: some of them are not held.
        """
        entries: Sequence[Entry] = self._entries.get(name, ())
        if len(entries) == 1 and entries[0].span == span and entries[0].tensor is not None:
            rows = entries[0].tensor
            return rows if self._codec is None else self._values(name, rows)
        if name in self._buffers and not subtract((span,), self._filled(name)):
            return self._buffers[name][0][:, slice(*span)]
        for entry in entries:
            if entry.span[0] <= span[0] and span[1] <= entry.span[1]:
                return self._values(name, _rows_of(self._rows(name, entry), entry.span, span))
        for entry in list(self._overlapping(name, span)):
            rows = self._values(name, self._rows(name, entry))
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
        if span is None:
            self._entries.pop(name, None)
            self._buffers.pop(name, None)
        elif name in self._entries:
            low, high = span
            self._entries[name] = [e for e in self._entries[name] if e.span[0] < low or high < e.span[1]]

    def claim(self) -> None:
        """Tell the meter what stays on the device, now that the block itself no longer counts it."""
        assert not self._packs, f"layer {self._layer}: {[spec.name for spec in self._packs]} were not sent"
        if not self._shelf.is_metered:
            return
        for entry in self._on_device():
            assert entry.tensor is not None
            entry.hold = self._shelf.claim(entry.tensor)

    def release(self) -> None:
        """Take the claims back: the block counts them again."""
        if not self._shelf.is_metered:
            return
        for entry in self._on_device():
            if entry.hold is not None:
                entry.hold.release()

    def _on_device(self) -> Iterator[Entry]:
        return (entry for row in self._entries.values() for entry in row if entry.tensor is not None)

    def _values(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """What rows stand for: themselves, unless they are in the codec."""
        skeleton = self._schedule.skeleton
        if self._codec is None or rows.dtype is not torch.uint8:
            return rows
        return decode_rows(self._codec, rows, skeleton.tensors[name].width, self._like.dtype)

    def _rows(self, name: str, entry: Entry) -> torch.Tensor:
        if entry.tensor is None:
            assert entry.blob is not None
            if entry.pack is None:
                entry.tensor = self._shelf.take(self._owner, entry.blob)
            else:
                entry.tensor = self._unpacked(entry.pack, entry.blob, name)
        return entry.tensor

    def _unpacked(self, pack: Pack, blob: Blob, name: str) -> torch.Tensor:
        if not pack.views:
            pack.back(self._shelf.take(self._owner, blob))
        return pack.views[name]

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


def _rows_of(tensor: torch.Tensor, span: Span, part: Span) -> torch.Tensor:
    """The rows on `part` of a tensor on the tokens of `span`."""
    return tensor if part == span else tensor[:, part[0] - span[0] : part[1] - span[0]]
