"""A small model whose blocks use what makes recompute hard (dropout, extra arguments), and a stack that writes down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlockKey
from headrace.storage.core.records import Medium

VOCAB, HIDDEN, NUM_LAYERS = 31, 16, 4


class Block(nn.Module):
    """Norm, gated MLP with dropout, residual; takes a scale table that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, None], *, gain: float = 1.0) -> torch.Tensor:
        hidden = F.gelu(self.up(self.norm(x) * tables[0]))
        return x + gain * self.down(self.dropout(hidden))


class SmallModel(nn.Module):
    """Embedding, blocks, head; forward returns the sum of token losses."""

    def __init__(self, num_layers: int = NUM_LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        table = torch.linspace(0.5, 1.5, HIDDEN)
        for block in self.blocks:
            x = block(x, (table, None), gain=0.5)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")


class ScriptedStack:
    """The six verbs over a dict of arrays; writes every call down and can be told to fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.blobs: dict[BlockKey, np.ndarray] = {}
        self.targets: dict[BlockKey, torch.Tensor] = {}
        self.media: dict[BlockKey, Medium] = {}
        self.shapes: dict[BlockKey, torch.Size] = {}
        self.dtypes: dict[BlockKey, torch.dtype] = {}
        self.moved = {(d, m): 0 for d in ("store", "load") for m in (Medium.host, Medium.ssd)}
        self.fail_load_of: int | None = None

    def prepare_store(
        self, key: BlockKey, tensor: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        assert key not in self.blobs, key
        self.calls.append(("prepare_store", key.layer))
        self.blobs[key], self.media[key] = tensor.view(torch.uint8).numpy().copy(), medium
        self.shapes[key], self.dtypes[key] = tensor.shape, tensor.dtype
        self.moved["store", medium] += tensor.nbytes

    def complete_store(self, key: BlockKey) -> None:
        assert key in self.blobs
        self.calls.append(("complete_store", key.layer))

    def prepare_load(self, key: BlockKey) -> None:
        assert key in self.blobs
        self.calls.append(("prepare_load", key.layer))
        self.moved["load", self.media[key]] += self.blobs[key].nbytes
        self.targets[key] = torch.empty(self.shapes[key], dtype=self.dtypes[key])

    def complete_load(self, key: BlockKey) -> torch.Tensor:
        self.calls.append(("complete_load", key.layer))
        if self.fail_load_of == key.layer:
            raise TransferFailed(f"{key}: checksum differs")
        target = self.targets.pop(key)
        target.view(torch.uint8).copy_(torch.from_numpy(self.blobs[key]))
        return target

    def discard(self, key: BlockKey) -> None:
        self.calls.append(("discard", key.layer))
        del self.blobs[key]
        self.targets.pop(key, None)


@pytest.fixture
def scripted_stack() -> ScriptedStack:
    return ScriptedStack()


@pytest.fixture
def make_model() -> Callable[..., SmallModel]:
    def make(seed: int = 0, num_layers: int = NUM_LAYERS) -> SmallModel:
        torch.manual_seed(seed)
        return SmallModel(num_layers)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(7))
