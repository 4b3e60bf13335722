"""Where every tensor of a token range lies in its staging block: pure Python, so that a planner can ask without one."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

MIN_ALIGNMENT_BYTES = 16
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# The dtypes that a block may hold another one of these for.
CASTABLE = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Piece:
    """One tensor's part of a staging block: its token range, contiguous.

    Args:
        name: the tensor's, for example "q" or "attention_lse"; unique in a layout.
        shape: of the tensor, with None where the tokens are: (1, None, 32, 128), (1, 32, None) or (None, 4096).
        dtype: of the tensor, by torch's name ("bfloat16").
        staged_dtype: in the block; another one than dtype is a cast on the way in and one back on the way out, between
            float32, bfloat16 and float16. None means dtype.

    Raises:
        ValueError: a shape without exactly one None or with a size below 1, an unknown dtype, a cast that there is not.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    staged_dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in self.shape if size is not None]
        if len(sizes) != len(self.shape) - 1 or any(size < 1 for size in sizes):
            raise ValueError(f"piece {self.name}: shape {self.shape}: sizes of at least 1 and one None for the tokens")
        for key, dtype in (("dtype", self.dtype), ("staged_dtype", self.staged)):
            if dtype not in ITEM_BYTES:
                raise ValueError(f"piece {self.name}: {key}={dtype}: one of {', '.join(ITEM_BYTES)}")
        if self.is_cast and not {self.dtype, self.staged} <= set(CASTABLE):
            casts = ", ".join(CASTABLE)
            raise ValueError(f"piece {self.name}: {self.dtype} staged as {self.staged}: casts are between {casts}")

    @property
    def staged(self) -> str:
        """The dtype in the block."""
        return self.dtype if self.staged_dtype is None else self.staged_dtype

    @property
    def is_cast(self) -> bool:
        """Whether block and tensor differ in dtype."""
        return self.staged != self.dtype

    @property
    def token_dim(self) -> int:
        """The tensor's dimension of tokens."""
        return self.shape.index(None)

    @property
    def num_outer(self) -> int:
        """Elements of the dimensions before the tokens."""
        return math.prod(size or 1 for size in self.shape[: self.token_dim])

    @property
    def num_inner(self) -> int:
        """Elements of the dimensions after the tokens."""
        return math.prod(size or 1 for size in self.shape[self.token_dim :])

    def shape_of(self, num_tokens: int) -> tuple[int, ...]:
        """The shape with this many tokens."""
        return tuple(num_tokens if size is None else size for size in self.shape)

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of so many tokens in the block."""
        return self.num_outer * num_tokens * self.num_inner * ITEM_BYTES[self.staged]


@dataclass(frozen=True)
class PackLayout:
    """A staging block: the pieces in order, each at an aligned offset, gaps zero.

    Args:
        pieces: what the block holds, at least one.
        num_tokens: tokens of the range, at least 1; where the range begins is said at each call.
        alignment_bytes: of every offset and of the whole; a power of two, at least 16. 512 or 4096 suit a drive.

    Raises:
        ValueError: a name twice, no piece, or a value out of range.
    """

    pieces: tuple[Piece, ...]
    num_tokens: int
    alignment_bytes: int = MIN_ALIGNMENT_BYTES

    def __post_init__(self) -> None:
        names = [piece.name for piece in self.pieces]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"layout: pieces {names}: at least one, each name once")
        if self.num_tokens < 1:
            raise ValueError(f"layout: num_tokens={self.num_tokens}: at least 1")
        alignment = self.alignment_bytes
        if alignment < MIN_ALIGNMENT_BYTES or alignment & (alignment - 1):
            raise ValueError(f"layout: alignment_bytes={alignment}: a power of two, at least {MIN_ALIGNMENT_BYTES}")

    @functools.cached_property
    def piece_bytes(self) -> tuple[int, ...]:
        """Bytes of every piece, without the gap behind it."""
        return tuple(piece.num_bytes(self.num_tokens) for piece in self.pieces)

    @functools.cached_property
    def offsets_bytes(self) -> tuple[int, ...]:
        """Where every piece begins."""
        return self._borders[:-1]

    @property
    def total_bytes(self) -> int:
        """Of the block, gaps included; a multiple of the alignment."""
        return self._borders[-1]

    @functools.cached_property
    def _borders(self) -> tuple[int, ...]:
        alignment = self.alignment_bytes
        return tuple(itertools.accumulate((-(-size // alignment) * alignment for size in self.piece_bytes), initial=0))

    def place(self, name: str) -> tuple[int, int]:
        """Offset and bytes of a piece, by name.

        Raises:
            ValueError: no such piece.
        """
        for piece, offset, size in zip(self.pieces, self.offsets_bytes, self.piece_bytes, strict=True):
            if piece.name == name:
                return offset, size
        raise ValueError(f"layout: no piece {name}; there are {', '.join(piece.name for piece in self.pieces)}")
