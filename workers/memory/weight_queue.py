"""Gradients of weights that run later than those of inputs: a backward in two passes, I and W (arXiv 2401.10241).

I leaves x and dy of every linear segment and tile here; W runs their products, in the order in which I left them. The
gradients of all parameters of a block are summed over its micro-batches in fp32 (fp64 for fp64) and handed to autograd
at the end of the step: FSDP2 sees one gradient for a block and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headrace.workers.memory.flow import Carry
from headrace.workers.memory.meter import Hold, Meter
from headrace.workers.model.program import LinearRule, Shared, Tensors
from headrace.workers.model.skeleton import Span

Key = tuple[int, int]
Parameters = Callable[[], Tensors]


@dataclass
class Product:
    """What one segment's dW needs on one tile.

    Args:
        x: (B, n, in). rows: of every dy, (B n, out), by tensor name.
        holds: the meter's claims on them.
    """

    layer: int
    rule: LinearRule
    x: torch.Tensor
    rows: Tensors
    at: tuple[Span, Shared]
    holds: tuple[Hold, ...] = ()


class WeightQueue:
    """Of one rank of a pipeline, in one step.

    Args:
        meter: counts what waits here; None counts nothing.

    Attributes:
        is_open: whether the backward at work is an I.
    """

    def __init__(self, meter: Meter | None) -> None:
        self._meter, self._waiting = meter, dict[Key, list[Product]]()
        self._open: list[Product] = []
        self._holds: dict[int, list[Hold]] = {}
        self._carries: dict[int, tuple[Carry, Parameters]] = {}
        self.is_open = False

    def carry(self, layer: int, params: Parameters) -> Carry:
        """Where the gradients of a block's parameters are added up; `params` reads these."""
        return self._carries.setdefault(layer, (Carry(), params))[0]

    @contextmanager
    def input_gradient(self, stage: int, micro_batch: int) -> Iterator[None]:
        """An I runs meanwhile: its products wait for the W of the same stage and micro-batch."""
        self.is_open = True
        yield
        self._waiting[stage, micro_batch], self._open = self._open, []
        self.is_open = False

    def put(self, product: Product) -> None:
        """A product waits from now on. Nobody may write to its tensors."""
        self._open.append(product)

    def claim(self, layer: int) -> None:
        """Tell the meter what a block left here, now that the block itself no longer counts it: also its sums, once."""
        if self._meter is None:
            return
        for product in self._open:
            if product.layer == layer:
                product.holds = tuple(map(self._meter.hold, (product.x, *product.rows.values())))
        sums = self._carries[layer][0].sums
        if layer not in self._holds and sums is not None:
            self._holds[layer] = list(map(self._meter.hold, sums.state().values()))

    @torch.no_grad()
    def run(self, stage: int, micro_batch: int) -> None:
        """W: the products of an I. Raises KeyError where they have run, or where that I has not."""
        products = self._waiting.pop((stage, micro_batch))
        for product in products:
            sums = self._carries[product.layer][0].sums
            assert sums is not None, "I has made them"
            product.rule.grad_weight(sums.params, product.x, product.rows, sums, product.at)
            for hold in product.holds:
                hold.release()
            product.x, product.rows, product.holds = product.x.new_empty(0), {}, ()

    def end(self) -> None:
        """The step is over: add the gradients to those of the parameters.

        Raises:
            RuntimeError: products wait whose W did not run.
        """
        if self._waiting:
            raise RuntimeError(f"gradients of weights were not computed: (stage, micro-batch) {sorted(self._waiting)}")
        self._holds.clear()
        while self._carries:
            _, (carry, params) = self._carries.popitem()
            if carry.sums is not None:
                pairs = [(param, carry.sums.take(name)) for name, param in params().items() if carry.sums.wants(name)]
                if pairs:
                    torch.autograd.backward([param for param, _ in pairs], [grad for _, grad in pairs])

    def drop(self) -> None:
        """Forget all of an unfinished step."""
        self._waiting, self._open, self.is_open = {}, [], False
        self._holds.clear()
        self._carries.clear()
