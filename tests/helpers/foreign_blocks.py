"""A model of foreign blocks for tests of their saved tensors, its plans, and the bytes that its blocks save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from headrace.helpers.training import FOREIGN_KEEP
from headrace.storage.core.records import Medium
from headrace.workers.memory.plan import LayerPlan, MemoryPlan, Residence

HOST, SSD, HBM = Residence.host, Residence.ssd, Residence.hbm
ALL_HOST, ALL_SSD = LayerPlan.of(x=HOST, saved=HOST), LayerPlan.of(x=SSD, saved=SSD)
BATCH, WIDTH, LENGTH, NUM_BLOCKS = 2, 48, 40, 4
ROWS = BATCH * LENGTH
ROW_BYTES = ROWS * 4  # of one fp32 column
Bytes = dict[Medium, int]


class Mlp(nn.Module):
    """Saves its input, the norm's output and two of twice the width; the norm's statistics are small."""

    saved_bytes = 5 * WIDTH * ROW_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def model_of(make_block: Callable[[], nn.Module], num_blocks: int = NUM_BLOCKS) -> nn.Sequential:
    """The blocks between two linear layers, seeded."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, WIDTH), *(make_block() for _ in range(num_blocks)), nn.Linear(WIDTH, 3))


def data(length: int = LENGTH) -> torch.Tensor:
    """A seeded batch."""
    return torch.randn(BATCH, length, 8, generator=torch.Generator().manual_seed(length))


def train(model: nn.Module, lengths: tuple[int, ...] = (LENGTH, 56, 24)) -> list[torch.Tensor]:
    """Losses of every pass and the summed gradients; longer and shorter inputs in turn."""
    torch.manual_seed(2)
    losses = []
    for length in lengths:
        loss = model(data(length)).square().sum()
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters())]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """To the bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def plan_of(*layers: LayerPlan) -> MemoryPlan:
    """A plan of these rows."""
    return MemoryPlan("test", layers)


OFF = plan_of(*(ALL_HOST,) * (NUM_BLOCKS - 1), FOREIGN_KEEP)
