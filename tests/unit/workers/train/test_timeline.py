"""Marks of a step, against a model whose blocks tell when they ran."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.workers.train.timeline import Timeline


class Sleep(torch.autograd.Function):
    """The identity, in its own time."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, log: list, layer: int) -> torch.Tensor:
        ctx.log, ctx.layer = log, layer
        log.append(("forward", layer, time.perf_counter()))
        return x * 2

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.log.append(("backward", ctx.layer, time.perf_counter()))
        return grad * 2, None, None


class Block(nn.Module):
    def __init__(self, log: list, layer: int) -> None:
        super().__init__()
        self.log, self.layer = log, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x, self.log, self.layer)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_every_block_computes_inside_its_bars(num_micro_batches: int, tmp_path: Path) -> None:
    log: list[tuple[str, int, float]] = []
    blocks = [Block(log, layer) for layer in range(3)]
    timeline = Timeline(blocks, torch.device("cpu"))
    timeline.write(tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []

    def step(number: int) -> torch.Tensor:
        weight = torch.ones(4, requires_grad=True)
        timeline.begin()
        for _ in range(num_micro_batches):
            x = weight * 1.0
            for block in blocks:
                x = block(x)
            x.sum().backward()
        timeline.end(number)
        return weight.grad

    step(6)
    log.clear()
    grad = step(7)
    assert grad.tolist() == [num_micro_batches * 8.0] * 4
    with torch.no_grad():  # an evaluation leaves no mark
        blocks[0](torch.ones(4))
    log.pop()
    timeline.write(tmp_path / "deep" / "timeline.json")
    found = json.loads((tmp_path / "deep" / "timeline.json").read_text())
    assert found["step"] == 7
    one = [("forward", 0), ("forward", 1), ("forward", 2), ("head", 2)]
    one += [("backward", 2), ("backward", 1), ("backward", 0)]
    assert [(x["what"], x["layer"]) for x in found["spans"]] == one * num_micro_batches + [("update", -1)]
    bars = [span for span in found["spans"] if span["what"] in ("forward", "backward")]
    assert [(x["what"], x["layer"]) for x in bars] == [entry[:2] for entry in log]
    for bar, (_, _, at_s) in zip(bars, log, strict=True):
        assert bar["start_s"] <= at_s <= bar["end_s"]
    starts = [span["start_s"] for span in found["spans"]]
    assert starts == sorted(starts)
