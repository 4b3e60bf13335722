"""Gradients on their way through a block's backward: of one tile, and of parameters over several calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from headrace.workers.model.param_sums import ParamSums
from headrace.workers.model.program import Tensors


@dataclass
class Carry:
    """Sums of a block's parameter gradients over several calls, handed to autograd by the last one.

    Args:
        is_last: whether the call at hand is the last one.
        restored: sums of another process, from which the next call goes on.
    """

    is_last: bool = False
    sums: ParamSums | None = None
    restored: Tensors | None = None

    def add_to(self, params: Tensors, wanted: Iterable[str]) -> ParamSums:
        """The sums of the calls so far."""
        if self.sums is None:
            self.sums = ParamSums(params, wanted, num_tiles=2)
            if self.restored is not None:
                self.sums.restore(self.restored)
                self.restored = None
        return self.sums

    def take(self, names: Sequence[str]) -> list[torch.Tensor | None]:
        """The gradients in the parameters' dtypes, if the call is the last one."""
        if not self.is_last:
            return [None] * len(names)
        sums, self.sums = self.sums, None
        assert sums is not None, "backward has run"
        return [sums.take(name) for name in names]

    def drop(self) -> None:
        """Forget the sums."""
        self.sums = self.restored = None


class Flow:
    """Gradients of one tile on their way back. `fresh` names those whose memory nobody else reads."""

    def __init__(self, grads: Tensors) -> None:
        self.grads = dict(grads)
        self.fresh: set[str] = set()

    def take(self, names: Sequence[str]) -> Tensors:
        """The gradients of these tensors; they are no longer here."""
        return dict(zip(names, map(self.grads.pop, names), strict=True))

    def add(self, name: str, grad: torch.Tensor, *, is_fresh: bool) -> None:
        """One more part of a gradient. `is_fresh`: nobody else reads its memory."""
        there = self.grads.get(name)
        if there is None:
            self.grads[name] = grad
        elif name in self.fresh:
            there += grad
            return
        elif is_fresh:
            grad += there
            self.grads[name] = grad
        else:
            self.grads[name] = there + grad
            is_fresh = True
        if is_fresh:
            self.fresh.add(name)
