"""The name of one block of bytes. No torch."""

from __future__ import annotations

from typing import NamedTuple


class BlockKey(NamedTuple):
    """Names one blob of one rank: which cell of which step's grid left it, and what it is.

    Args:
        step: optimizer step, from 0.
        layer: index of the decoder block, from 0.
        kind: skeletal tensor class, for example "layer_input".
        chunk: token chunk (or tile) index; 0 where the layer handles the whole sequence.
        micro_batch: index within the step; several may be in flight at once under pipeline schedules.
    """

    step: int
    layer: int
    kind: str
    chunk: int = 0
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"s{self.step}.m{self.micro_batch}.l{self.layer}.{self.kind}.c{self.chunk}"
