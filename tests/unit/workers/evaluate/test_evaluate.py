"""Token losses against transformers, equal bits for every residence, buckets of positions, bytes on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.tiny_models import LLAMA
from headrace.kernels.api import Packing
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.evaluate.evaluate import document_log_probs, eval_plan, evaluate, tier_bytes
from headrace.workers.evaluate.positions import Bucket, PositionLosses
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.hf import load_config, load_weights
from headrace.workers.verify.oracle import Oracle, load_oracle
from headrace.workers.verify.ours import open_tiers

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 9}),
}
SEQ_LEN, CHUNK = 37, 8
DOCUMENTS = [5, 21, 11, 37]  # of two rows


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A Hugging Face folder of a family; q and k weights are large, so that attention is not uniform."""
    transformers = pytest.importorskip("transformers")

    def make(family: str) -> Path:
        name, fields = FAMILIES[family]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SHAPE, **fields}))
        with torch.no_grad():
            for key, param in model.named_parameters():
                if "q_proj" in key or "k_proj" in key:
                    param.mul_(6.0)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return folder

    return make


class TokenLosses(PositionLosses):
    """Also keeps the loss of every token."""

    def __init__(self, first: int = 4) -> None:
        super().__init__(first, SEQ_LEN, CPU)
        self.parts: list[torch.Tensor] = []

    def add(self, positions: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        super().add(positions, targets, losses)
        self.parts.append(losses)


def packed_batch() -> TokenBatch:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 61, (2, SEQ_LEN), generator=draw)
    targets = tokens.roll(-1, 1)
    targets[:, ::7] = -100
    return TokenBatch(tokens, targets, Packing.of_lengths(DOCUMENTS))


def losses_of(model: Decoder, batch: TokenBatch, memory: MemoryPreset) -> TokenLosses:
    plan = eval_plan(memory, skeletons_of(model.blocks), SEQ_LEN, CHUNK)
    wanted = tier_bytes(plan, model.config, batch_size=2, seq_len=SEQ_LEN, itemsize=8)
    found, log = TokenLosses(), TransferLog()
    with open_tiers(wanted, CPU, log) as stack:
        evaluate(model, [batch], plan, stack, found, loss_tile=16)
    assert bool(log.moved_bytes) is (memory in (MemoryPreset.chunk_host, MemoryPreset.chunk_ssd))
    return found


def by_transformers(folder: Path, batch: TokenBatch) -> torch.Tensor:
    """(B, T), document by document."""
    model = load_oracle(folder, Oracle.fp64, CPU)
    tokens, parts = batch.tokens.flatten(), []
    with torch.no_grad():
        for document in tokens.split(DOCUMENTS):
            parts.append(model(document[None]).logits[0])
    losses = F.cross_entropy(torch.cat(parts).double(), batch.targets.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(batch.tokens)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_of_every_token_is_that_of_transformers_wherever_keys_live(
    folder_of: Callable[[str], Path], family: str
) -> None:
    folder, batch = folder_of(family), packed_batch()
    model = Decoder(load_config(folder), dtype=torch.float64)
    load_weights(model, folder)
    wanted = by_transformers(folder, batch)
    found: dict[MemoryPreset, torch.Tensor] = {}
    for memory in (MemoryPreset.chunk, MemoryPreset.chunk_host, MemoryPreset.chunk_ssd, MemoryPreset.keep):
        losses = losses_of(model.eval(), batch, memory)
        found[memory] = torch.cat(losses.parts, dim=1)
        assert float((found[memory] - wanted).abs().max() / wanted.max()) <= 1e-11, memory
        assert losses.whole().loss == pytest.approx(float(wanted.sum()) / batch.num_targets, rel=1e-13)
    for memory in (MemoryPreset.chunk_host, MemoryPreset.chunk_ssd):
        assert torch.equal(found[memory], found[MemoryPreset.chunk])


@pytest.mark.parametrize("memory", [MemoryPreset.chunk, MemoryPreset.keep])
def test_every_response_has_its_log_probability(folder_of: Callable[[str], Path], memory: MemoryPreset) -> None:
    """Against transformers on the prompt with one response alone."""
    prompt, responses = 11, (5, 12, 9)
    folder, batch = folder_of("mistral"), packed_batch()
    packing = Packing.of_lengths([prompt, *responses] * 2, parents=[None, 0, 0, 0, None, 4, 4, 4])
    batch = TokenBatch(batch.tokens, batch.targets, packing)
    batch.targets[:, :prompt] = -100
    model = Decoder(load_config(folder), dtype=torch.float64)
    load_weights(model, folder)
    handle = apply_plan(
        model, eval_plan(memory, skeletons_of(model.blocks), SEQ_LEN, CHUNK), None, meter=None, bucket_plans=None
    )
    found = document_log_probs(open_sweep(model, handle, None, loss_tile=16, itemsize=8), batch)
    handle.remove()
    oracle, wanted = load_oracle(folder, Oracle.fp64, CPU), []
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        wanted.append(0.0)
        for begin, end in ((11, 16), (16, 28), (28, 37)):
            alone = torch.cat([tokens[:prompt], tokens[begin:end]])
            with torch.no_grad():
                log_probs = oracle(alone[None]).logits[0, prompt:].double().log_softmax(-1)
            own = targets[begin:end]
            wanted.append(float(log_probs.gather(1, own.clamp(min=0)[:, None])[:, 0][own != -100].sum()))
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-11, atol=0)


def test_buckets_hold_the_losses_of_their_positions() -> None:
    batch, losses = packed_batch(), PositionLosses(4, SEQ_LEN, CPU)
    values = torch.rand(2, SEQ_LEN, dtype=torch.float64).masked_fill(batch.targets == -100, 0.0)
    for begin in range(0, SEQ_LEN, 10):
        span = (begin, min(begin + 10, SEQ_LEN))
        part = slice(*span)
        positions = batch.packing.positions(2, SEQ_LEN, CPU, span)
        assert torch.equal(positions, batch.packing.positions(2, SEQ_LEN, CPU)[:, part])
        losses.add(positions, batch.targets[:, part], values[:, part])
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])
    wanted = []
    for begin, end in ((0, 4), (4, 8), (8, 16), (16, 32), (32, 64)):
        inside = (positions >= begin) & (positions < end) & (batch.targets.flatten() != -100)
        wanted.append(Bucket(begin, end, int(inside.sum()), pytest.approx(float(values.flatten()[inside].sum()))))
    assert losses.buckets() == wanted
    assert losses.whole().num_tokens == batch.num_targets


def test_figures_that_json_cannot_hold_are_null() -> None:
    assert Bucket(0, 4, 2, 4.0).to_json() == {
        "begin": 0,
        "end": 4,
        "tokens": 2,
        "loss": 2.0,
        "perplexity": math.exp(2.0),
    }
    assert Bucket(0, 4, 1, 800.0).to_json()["perplexity"] is None
    assert Bucket(0, 4, 1, math.nan).to_json()["loss"] is None
    assert Bucket(0, 4, 0, 0.0).to_json()["perplexity"] is None


def peak_bytes(seq_len: int, memory: MemoryPreset, documents: int) -> int:
    config = replace(LLAMA, num_layers=2, num_heads=2, num_kv_heads=1)
    model = Decoder(config)
    model.init_weights(0)
    tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    batch = TokenBatch(tokens, tokens, Packing.of_lengths([seq_len // documents] * documents))
    plan = eval_plan(memory, skeletons_of(model.blocks), seq_len, 32)
    wanted = tier_bytes(plan, config, batch_size=1, seq_len=seq_len, itemsize=4)
    apart: list[Any] = [*model.parameters(), tokens, batch.packing.cu_seqlens]
    # As many buckets whatever the length.
    losses = PositionLosses(1024, 1024, CPU)
    with open_tiers(wanted, CPU, TransferLog()) as stack, LiveBytes(apart) as live:
        evaluate(model.eval(), [batch], plan, stack, losses, loss_tile=16)
    return live.peak


@pytest.mark.parametrize("documents", [1, 2])
def test_device_bytes_do_not_grow_with_the_length(documents: int) -> None:
    # A document of five chunks has all the loads and stores under way that there may be: the last chunk stores nothing.
    lengths = (160 * documents, 320 * documents)
    shorter, longer = (peak_bytes(length, MemoryPreset.chunk_ssd, documents) for length in lengths)
    assert shorter == longer
    shorter, longer = (peak_bytes(length, MemoryPreset.chunk, documents) for length in lengths)
    assert shorter < longer  # keys and values in HBM do: the count sees them
