"""The tiles that footprint.py walks over, the sizes of a block's tensors there, and what is alive. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headrace.kernels.codecs.config import plain_workspace
from headrace.workers.memory.head_bytes import WIDE_BYTES
from headrace.workers.memory.plan import HELD, Cuts, LayerPlan, Residence
from headrace.workers.memory.schedule import Schedule, alike, blobs_at
from headrace.workers.model.skeleton import Segment, Span


class Live:
    """Named objects that live on the device: bytes now and at most, in all and beside the sums of gradients."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}
        self.now = self.peak = self.sums = self.peak_beside_sums = 0

    def add(self, name: str, num_bytes: int) -> None:
        """A new object; one that is there already stays as it is."""
        if name not in self._bytes:
            self._bytes[name] = num_bytes
            self.now += num_bytes
            self.passing(0)

    def add_sum(self, name: str, num_bytes: int) -> None:
        """A sum of gradients, which stays."""
        if name not in self._bytes:
            self.sums += num_bytes
            self.add(name, num_bytes)

    def rename(self, names: Iterable[str], new: str) -> bool:
        """Give the first of these objects that is there another name; whether one is."""
        there = next((name for name in names if name in self._bytes), None)
        if there is not None:
            self._bytes[new] = self._bytes.pop(there)
        return there is not None

    def drop(self, names: Iterable[str]) -> None:
        """Objects that may be there are freed."""
        for name in names:
            self.now -= self._bytes.pop(name, 0)

    def __contains__(self, name: str) -> bool:
        return name in self._bytes

    def passing(self, num_bytes: int) -> None:
        """Bytes that are there for a moment beside everything else."""
        self.peak = max(self.peak, self.now + num_bytes)
        self.peak_beside_sums = max(self.peak_beside_sums, self.now + num_bytes - self.sums)


class Piece(NamedTuple):
    """A tile, or the tiles of a run that lie between those which stand for it."""

    span: Span
    is_between: bool


class Walk:
    """Sizes of a block's tensors, on all tokens or on a tile."""

    def __init__(
        self,
        schedule: Schedule,
        plan: LayerPlan,
        cuts: Cuts,
        *,
        batch_size: int,
        num_tokens: int,
        itemsize: int,
        casts_products: bool,
    ) -> None:
        self.schedule, self.plan, self.cuts = schedule, plan, cuts
        self.batch_size, self.num_tokens, self.itemsize = batch_size, num_tokens, itemsize
        self.all: Span = (0, num_tokens)
        self.coded = schedule.skeleton.coded
        self.pieces = self.pieces_back = self._pieces(cuts.tiles(num_tokens))
        if any(segment.state for segment in schedule.skeleton.segments):  # a scan's tiles go back from the last one
            self.pieces_back = self._pieces(cuts.tiles(num_tokens)[::-1])
        self.is_single = len(self.pieces) == 1
        # A block with one tile and one head group has no sums: see ParamSums.
        has_sums = not self.is_single or schedule.skeleton.head_groups > 1
        self.casts_products = casts_products and itemsize < WIDE_BYTES and has_sums
        # Whole tensors that leave in one blob with others are written into its memory.
        self.together = {
            name: blob.names
            for names, is_whole in schedule.moments
            if is_whole
            for blob in blobs_at(plan, names, self.all, num_tokens)
            if len(blob.names) > 1
            for name in blob.names
        }

    def _pieces(self, tiles: Sequence[Span]) -> list[Piece]:
        """The tiles; of each run of tiles that are treated alike only the first two and the last by themselves.

        The first tile makes what the whole run uses. From then on the bytes that stay grow, or shrink, by the same
        amount with every tile: the run's peak is in one of its first two tiles or in its last.
        """
        pieces: list[Piece] = []
        for run in alike(self.plan, tiles):
            pieces += [Piece(tile, is_between=False) for tile in run[:2]]
            if between := run[2:-1]:
                spans = sorted((between[0], between[-1]))
                pieces.append(Piece((spans[0][0], spans[-1][1]), is_between=True))
            pieces += [Piece(tile, is_between=False) for tile in run[2:][-1:]]
        return pieces

    def size(self, name: str, span: Span) -> int:
        spec = self.schedule.skeleton.tensors[name]
        return self.batch_size * spec.num_rows(span, self.cuts.token_tile) * spec.bytes_per_token(self.itemsize)

    def held_size(self, name: str, span: Span) -> int:
        """Of a tensor as a plan holds it: in its codec, where it has one."""
        skeleton = self.schedule.skeleton
        rows = self.batch_size * skeleton.tensors[name].num_rows(span, self.cuts.token_tile)
        return rows * skeleton.held_bytes(name, self.itemsize)

    def rows(self, per_token: int, span: Span) -> int:
        return self.batch_size * (span[1] - span[0]) * per_token

    def bytes_in(self, name: str, *residences: Residence) -> int:
        return sum(self.held_size(name, span) for span in self.plan.spans(name, self.num_tokens, *residences))

    def copied(self, names: Sequence[str], span: Span) -> int:
        """Bytes of tensors of a tile that are copied together for one blob."""
        blobs = blobs_at(self.plan, names, span, self.num_tokens)
        return sum(self.held_size(name, span) for blob in blobs if len(blob.names) > 1 for name in blob.names)

    def codec_bytes(self, name: str, span: Span) -> tuple[int, int]:
        """What the plain codec takes to encode, beside the tensor and its codes, and to decode, with the result."""
        codec, width = self.schedule.skeleton.codec, self.schedule.skeleton.tensors[name].width
        assert codec is not None, "a coded tensor has a codec"
        encode, decode = plain_workspace(codec, width, self.itemsize)
        return self.rows(encode, span), self.rows(decode, span)

    def state_bytes(self, segment: Segment) -> int:
        """Of what a scan hands from tile to tile; 0 for other segments."""
        return 0 if segment.state is None else self.size(segment.state.name, (0, 1))

    def places(self, name: str, span: Span) -> int:
        """Bytes of a span that the plan places, on the device or elsewhere."""
        rows = self.plan.spans(name, self.num_tokens, *HELD)
        parts = ((max(begin, span[0]), min(end, span[1])) for begin, end in rows)
        return sum(self.held_size(name, part) for part in parts if part[0] < part[1])
