"""What skeletons are made of: tensors and segments. No torch.

A block is an ordered tuple of segments. A segment reads tensors and makes tensors, and says which of the values its own
gradient needs. The root tensor `x` is the block's input, the last tensor made is its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from headrace.kernels.codecs.config import CodecName, stash_bytes

ROOT = "x"
Span = tuple[int, int]  # tokens [begin, end)


class Reach(StrEnum):
    """Which tokens an output row depends on."""

    token = "token"  # its own: the segment may run on any span of tokens
    prefix = "prefix"  # its own and all earlier ones
    scan = "scan"  # its own and a state from the token before


class Kind(StrEnum):
    """How a segment finds its gradient."""

    linear = "linear"  # closed form; dInput and dWeight apart; its product never runs again for its own gradient
    mix = "mix"  # its own: attention from q, k, v, out and LSE; a scan from what it reads and its state
    pointwise = "pointwise"  # closed form, or run again under autograd on the tile; its values are made again: cheap
    opaque = "opaque"  # a whole foreign block, run again under autograd


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a block.

    Args:
        width: elements per token.
        least_itemsize: bytes of an element, where that is more than the compute dtype has.
        is_state: the state of a scan: one row for every token tile, what stands before its first token.
        is_aside: no segment reads it: a value for the gradient of the segment that makes it, without one of its own.
    """

    name: str
    width: int
    least_itemsize: int = 0
    is_state: bool = False
    is_aside: bool = False

    def num_rows(self, span: Span, token_tile: int | None = None) -> int:
        """Rows on these tokens; `token_tile` None: they are one tile."""
        num_tokens = span[1] - span[0]
        return -(-num_tokens // (token_tile or num_tokens)) if self.is_state else num_tokens

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one row, `itemsize` being that of the compute dtype."""
        return self.width * max(itemsize, self.least_itemsize)


@dataclass(frozen=True)
class Workspace:
    """Bytes per token that a segment takes beside what it reads and makes, with the plain kernels of kernels/reference.

    Args:
        run: while it runs.
        grad: while its gradient is taken, beside the gradients that come in and go out.
    """

    run: int = 0
    grad: int = 0


NO_WORKSPACE = Workspace()


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One step of a block's program.

    Args:
        reads: names of the tensors that running it needs, on its own tokens; of a scan its state is among them.
        earlier: those of `reads` that it needs of all earlier tokens too; empty where the reach is `token`.
        receives: names of the tensors that it is given once, in forward, and keeps itself: keys and values of a chunk.
        makes: what it makes. Of a scan one is the state before its tokens; it reads that and hands the next one on.
        needs: names of the tensors whose values its gradient needs, of `reads` and `makes`.
        adds: the one of `reads` that is added to a product (a residual connection); only its gradient passes.
        macs_per_token: multiply-adds of matrix products per token.
        macs_per_pair: the same per pair of a query and a key that it sees.
        weights: elements of its parameters.
        projections: leaf names of a linear segment's layers, one for each tensor that it makes.
        frozen: whether its parameters get no gradient, those of its adapters apart.
        adapted: elements of its adapters, which are among `weights` and, as multiply-adds, in `macs_per_token`.
        key_heads: of attention: KV heads, each of which works for itself with its query heads; 0: none are shown.
        exchanged: elements per token that Ulysses ranks exchange when it runs, and again for its gradient.
        gathered: elements per token that it gathers from all tensor ranks, or sums and scatters to them; again for its
            gradient.
        tokens_per_row: tokens that a row of what it reads and makes holds side by side: one of every tensor rank, of
            attention one of every tensor and Ulysses rank.
        workspace: of the bytes of an element of the compute dtype.
    """

    name: str
    kind: Kind
    reads: tuple[str, ...]
    makes: tuple[TensorSpec, ...]
    needs: tuple[str, ...]
    reach: Reach = Reach.token
    earlier: tuple[str, ...] = ()
    receives: tuple[str, ...] = ()
    adds: str | None = None
    macs_per_token: int = 0
    macs_per_pair: int = 0
    weights: int = 0
    projections: tuple[str, ...] = ()
    frozen: bool = False
    adapted: int = 0
    key_heads: int = 0
    exchanged: int = 0
    gathered: int = 0
    tokens_per_row: int = 1
    workspace: Callable[[int], Workspace] = lambda itemsize: NO_WORKSPACE

    @cached_property
    def made(self) -> tuple[str, ...]:
        """Names of what it makes."""
        return tuple(tensor.name for tensor in self.makes)

    @cached_property
    def graded(self) -> tuple[str, ...]:
        """Names of what it makes that has a gradient."""
        return tuple(tensor.name for tensor in self.makes if not tensor.is_aside)

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """Names of what forward must have for it."""
        return (*self.reads, *self.receives)

    @cached_property
    def state(self) -> TensorSpec | None:
        """What a scan hands from token to token; None of other segments."""
        return next((tensor for tensor in self.makes if tensor.is_state), None)

    def flops(self, num_tokens: float, num_pairs: float) -> float:
        """Of one run over so many tokens that see so many (query, key) pairs; a multiply and an add are two."""
        return 2.0 * (self.macs_per_token * num_tokens + self.macs_per_pair * num_pairs)

    @property
    def trained(self) -> int:
        """Elements of its parameters that get a gradient."""
        return self.adapted if self.frozen else self.weights

    def grad_flops(self, num_tokens: float, num_pairs: float) -> float:
        """Of its gradient: as many for the inputs as one run, and as many again for the parameters that want one."""
        wanted = self.adapted if self.frozen else self.macs_per_token
        return 2.0 * ((self.macs_per_token + wanted) * num_tokens + 2 * self.macs_per_pair * num_pairs)


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A block's program.

    Args:
        root: the block's input.
        segments: in the order in which they run.
        skeletal: names of the tensors that a plan may place, in the order in which they are made, the root first. The
            others are derived: made again from what is held.
        head_groups: that its attention is cut into (head_groups.py).
        codec: of the values that are held of its `coded` tensors; None: they are held as they are.

    Raises:
        ValueError: a tensor is read before it is made or made twice, or a name that does not exist.
    """

    root: TensorSpec
    segments: tuple[Segment, ...]
    skeletal: tuple[str, ...]
    head_groups: int = 1
    codec: CodecName | None = None

    def __post_init__(self) -> None:
        known = {self.root.name}
        for segment in self.segments:
            made, states = set(segment.made), {tensor.name for tensor in segment.makes if tensor.is_state}
            if missing := [name for name in segment.takes if name not in known | states]:
                raise ValueError(f"segment {segment.name}: reads {missing}, which no earlier segment makes")
            if twice := made & known:
                raise ValueError(f"segment {segment.name}: makes {sorted(twice)}, which are there already")
            if stray := set(segment.needs) - made - set(segment.reads):
                raise ValueError(f"segment {segment.name}: needs {sorted(stray)}, which it neither reads nor makes")
            if stray := set(segment.earlier) - set(segment.reads):
                raise ValueError(f"segment {segment.name}: earlier {sorted(stray)} are not among its reads")
            if bool(segment.earlier or segment.receives) != (segment.reach is Reach.prefix):
                raise ValueError(f"segment {segment.name}: reach {segment.reach.value} with earlier={segment.earlier}")
            used = set(segment.reads) & set(segment.needs) & set(self.skeletal)
            if len(states) != (segment.reach is Reach.scan) or not states <= used:
                raise ValueError(
                    f"segment {segment.name}: reach {segment.reach.value} with the states {sorted(states)}: a scan "
                    "makes one, reads and needs it, and has it among the skeletal tensors; others have none"
                )
            known |= made
        if stray := set(self.skeletal) - known:
            raise ValueError(f"skeletal tensors {sorted(stray)} are in no segment")
        if self.skeletal[:1] != (self.root.name,):
            raise ValueError(f"skeletal tensors {self.skeletal}: the root {self.root.name} stands first")

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by name, in the order in which they are made."""
        return {tensor.name: tensor for tensor in (self.root, *(t for s in self.segments for t in s.makes))}

    @cached_property
    def maker(self) -> dict[str, Segment]:
        """The segment that makes a tensor; the root has none."""
        return {name: segment for segment in self.segments for name in segment.made}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what all else can be made again from, tile by tile: the root, and the states of scans."""
        return (self.root.name, *(segment.state.name for segment in self.segments if segment.state is not None))

    @cached_property
    def coded(self) -> frozenset[str]:
        """Skeletal tensors that are held in the codec: those that only token segments of one group read.

        They are placed tile by tile. Attention reads whole tensors, and a block's input is the output of another.
        """
        if self.codec is None:
            return frozenset()
        groups = [(group, {name for s in group for name in s.made}) for group in self.groups()]
        states = {segment.state.name for segment in self.segments if segment.state is not None}
        read_elsewhere = {
            name for group, made in groups for s in group for name in (*s.takes, *s.needs) if name not in made
        }
        alone = {
            name
            for group, made in groups
            if group[0].reach is not Reach.prefix and group[0].kind is not Kind.opaque
            for name in made
        }
        return frozenset(self.skeletal) & alone - read_elsewhere - states - {self.result}

    @property
    def result(self) -> str:
        """Name of the block's output."""
        return self.segments[-1].made[-1]

    @property
    def wanted(self) -> frozenset[str]:
        """Tensors whose values the block's backward uses."""
        return frozenset(name for segment in self.segments for name in segment.needs)

    def held_bytes(self, name: str, itemsize: int) -> int:
        """Bytes of one row of a tensor where a plan holds it: those of its codec, where it has one."""
        tensor = self.tensors[name]
        if self.codec is None or name not in self.coded:
            return tensor.bytes_per_token(itemsize)
        return stash_bytes(self.codec, tensor.width)

    def bytes_per_token(self, names: Iterable[str], itemsize: int) -> int:
        """Bytes of one token's rows of these tensors where a plan holds them."""
        return sum(self.held_bytes(name, itemsize) for name in names)

    def groups(self) -> Iterator[tuple[Segment, ...]]:
        """The segments cut where a tile of tokens is not enough: attention and foreign blocks stand alone.

        A scan goes with the token segments around it: its tiles come one after another.
        """
        run: list[Segment] = []
        for segment in self.segments:
            if segment.reach is not Reach.prefix and segment.kind is not Kind.opaque:
                run.append(segment)
                continue
            if run:
                yield tuple(run)
            yield (segment,)
            run = []
        if run:
            yield tuple(run)


class DenseShape(NamedTuple):
    """What the skeleton of a dense block depends on."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    qk_norm: bool
    qkv_bias: bool

    @property
    def q_width(self) -> int:
        """Elements per token of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Elements per token of all key heads."""
        return self.num_kv_heads * self.head_size
