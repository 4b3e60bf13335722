"""When each block computed in the newest step of a rank: the compute lane of the report's picture of one step.

    forward of block l    from its call to its return
    head                  from the last block's return to the gradient of its output: norm, head, loss, and back
    backward of block l   from the gradient of its output to that of its input, with what is computed again
    update                the rest of the step: sums over ranks, clipping, optimizer

Times are of time.perf_counter, as in the transfer log. On a GPU they are those of events on the compute stream, set
against that clock at the start of the step; a mark costs the host some microseconds and the stream nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.workers.train.timeline_file import BACKWARD, FORWARD, HEAD, UPDATE

Mark = tuple[int, str, int, Any]  # micro-batch, what begins, block, time or event


class Timeline:
    """Marks the steps of one model; keeps the newest finished one.

    Args:
        blocks: in forward order. Each returns a tensor, which the next one takes.
        on_block: called with the number of a block, and whether backward comes to it, when its work begins; in forward
            also without gradients.
        has_head: whether the head follows the last block: not on all ranks of a pipeline.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        on_block: Callable[[int, bool], None] = lambda layer, is_backward: None,
        *,
        has_head: bool = True,
    ) -> None:
        self._device, self._num_blocks, self._on_block = device, len(blocks), on_block
        self._micro_batch, self._marks = -1, list[Mark]()
        self._after_last, self._is_told = HEAD if has_head else "", False
        self._base: tuple[float, Any] = (0.0, None)
        self.step: int | None = None
        self.spans: list[dict[str, Any]] = []
        for layer, block in enumerate(blocks):
            block.register_forward_pre_hook(self._before(layer))
            block.register_forward_hook(self._after(layer))

    def begin(self) -> None:
        """A step starts."""
        self._marks, self._micro_batch = [], -1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._base = (time.perf_counter(), self._now())

    def begin_pass(self, micro_batch: int) -> None:
        """A forward or a backward of a micro-batch begins: in a pipeline they do not follow each other."""
        self._micro_batch, self._is_told = micro_batch, True

    def end(self, step: int) -> None:
        """The step is done, on the device too.

        Args:
            step: its index, as in the keys of the transfer log.
        """
        marks = [(*mark[:3], self._seconds(mark[3])) for mark in self._marks]
        ends = [mark[3] for mark in marks[1:]] + [time.perf_counter()]
        self.step, self.spans = step, []
        for (micro_batch, what, layer, start_s), end_s in zip(marks, ends, strict=True):
            # Between micro-batches nothing is updated.
            if what and (what != UPDATE or micro_batch == self._micro_batch):
                span = {"micro_batch": micro_batch, "what": what, "layer": layer, "start_s": start_s, "end_s": end_s}
                self.spans.append(span)

    def seconds(self, what: str) -> float:
        """Of the newest step, all blocks and micro-batches together."""
        return sum(span["end_s"] - span["start_s"] for span in self.spans if span["what"] == what)

    def write(self, path: Path) -> None:
        """Write the newest step, if there is one. Raises OSError."""
        if self.step is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": self.step, "spans": self.spans}))

    def _before(self, layer: int) -> Any:
        def mark(block: nn.Module, args: tuple[Any, ...]) -> None:
            self._on_block(layer, False)
            if not torch.is_grad_enabled():
                return
            if layer == 0:
                self._micro_batch += not self._is_told
                self._on_gradient(args[0], UPDATE, -1)
            self._mark(FORWARD, layer)

        return mark

    def _after(self, layer: int) -> Any:
        def mark(block: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                if layer == 0 and not args[0].requires_grad and output.grad_fn is not None:
                    # A frozen embedding: no gradient of the input comes, so the end of the block's own node counts.
                    output.grad_fn.register_hook(lambda *grads: self._mark(UPDATE, -1))
                self._mark(self._after_last if layer == self._num_blocks - 1 else "", layer)
                self._on_gradient(output, BACKWARD, layer)

        return mark

    def _on_gradient(self, tensor: torch.Tensor, what: str, layer: int) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self._mark(what, layer))

    def _mark(self, what: str, layer: int) -> None:
        if what == BACKWARD:
            self._on_block(layer, True)
        self._marks.append((self._micro_batch, what, layer, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, now: Any) -> float:
        clock_s, event = self._base
        return float(now) if event is None or isinstance(now, float) else clock_s + event.elapsed_time(now) / 1e3
