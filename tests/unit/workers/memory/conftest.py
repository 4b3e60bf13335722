"""A small model whose blocks use what makes recompute hard (dropout, extra arguments), and a stack that writes down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headrace.storage.core.errors import TransferFailed
from headrace.storage.core.keys import BlobKey
from headrace.storage.core.records import Medium
from headrace.storage.core.states import BlobState, Verb, after
from headrace.workers.memory.spilling import SpillTiers

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
    """The verbs over a dict of arrays; writes every call down and can be told to fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.blobs: dict[BlobKey, np.ndarray] = {}
        self.sources: dict[BlobKey, torch.Tensor] = {}
        self.targets: dict[BlobKey, torch.Tensor] = {}
        self.media: dict[BlobKey, Medium] = {}
        self.states: dict[BlobKey, BlobState] = {}
        self.forms: dict[BlobKey, tuple[torch.Size, torch.dtype]] = {}
        self.moved = {(d, m): 0 for d in ("store", "load") for m in (Medium.host, Medium.ssd)}
        self.num_given = 0
        self.fail_load_of: int | None = None

    def state(self, key: BlobKey) -> BlobState:
        return self.states.get(key, BlobState.absent)

    def prepare_store(
        self, key: BlobKey, tensor: torch.Tensor, medium: Medium, *, next_use: float | None = None
    ) -> None:
        assert key not in self.blobs, key
        self._turn(Verb.prepare_store, key)
        self.blobs[key] = tensor.view(-1).view(torch.uint8).numpy().copy()
        self.sources[key], self.media[key], self.forms[key] = tensor, medium, (tensor.shape, tensor.dtype)
        self.moved["store", medium] += tensor.nbytes

    def complete_store(self, key: BlobKey) -> None:
        self._turn(Verb.complete_store, key)
        del self.sources[key]

    def prepare_load(self, key: BlobKey, *, into: torch.Tensor | None = None) -> None:
        self._turn(Verb.prepare_load, key)
        if self.states[key] is BlobState.forwarding:
            assert into is None
            return
        self.num_given += into is not None
        self.moved["load", self.media[key]] += self.blobs[key].nbytes
        shape, dtype = self.forms[key]
        self.targets[key] = target = torch.empty(shape, dtype=dtype) if into is None else into
        assert (target.shape, target.dtype, target.is_contiguous()) == (shape, dtype, True)

    def complete_load(self, key: BlobKey) -> torch.Tensor:
        self._turn(Verb.complete_load, key)
        if self.fail_load_of == key.layer:
            raise TransferFailed(f"{key}: checksum differs")
        if key in self.sources:
            return self.sources[key]
        target = self.targets.pop(key)
        np.copyto(target.view(-1).view(torch.uint8).numpy(), self.blobs[key])
        return target

    def discard(self, key: BlobKey) -> None:
        self._turn(Verb.discard, key)
        del self.blobs[key]
        self.sources.pop(key, None)
        self.targets.pop(key, None)

    def _turn(self, verb: Verb, key: BlobKey) -> None:
        self.states[key] = after(key, self.state(key), verb)
        self.calls.append((verb.value, key.layer))


@pytest.fixture
def opened(monkeypatch) -> list[SpillTiers]:
    """The tiers of every spill of the test."""
    made: list[SpillTiers] = []
    original = SpillTiers.__init__
    monkeypatch.setattr(SpillTiers, "__init__", lambda self, *args: (made.append(self), original(self, *args))[1])
    return made


@pytest.fixture
def scripted_stack() -> ScriptedStack:
    return ScriptedStack()


@pytest.fixture(scope="session")
def make_scripted_stack() -> Callable[[], ScriptedStack]:
    return ScriptedStack


@pytest.fixture
def make_model() -> Callable[..., SmallModel]:
    def make(seed: int = 0, num_layers: int = NUM_LAYERS) -> SmallModel:
        torch.manual_seed(seed)
        return SmallModel(num_layers)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(7))
