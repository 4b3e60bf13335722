"""The name of one blob. No torch."""

from __future__ import annotations

from typing import NamedTuple


class BlobKey(NamedTuple):
    """Names one blob of one rank: whose it is, which tensor of which layer, and which tokens of it.

    Args:
        owner: who stores it, for example "call8"; no owner stores two tensors of one name at a time.
        layer: index of the decoder block, from 0.
        name: of the tensor, as the skeleton calls it, for example "x" or "gate".
        begin, end: the span [begin, end) of tokens, or of rows where there are no tokens.
        step: optimizer step, from 0; None: the blob lives across steps.
        micro_batch: index within the step; several may be in flight at once under pipeline schedules.
    """

    owner: str
    layer: int
    name: str
    begin: int
    end: int
    step: int | None = None
    micro_batch: int = 0

    def __str__(self) -> str:
        """As records and messages show it, for example "s3.m0.l1.x.t0-4096.call8"; without a step "m0.l1. ..."."""
        step = "" if self.step is None else f"s{self.step}."
        return f"{step}m{self.micro_batch}.l{self.layer}.{self.name}.t{self.begin}-{self.end}.{self.owner}"
