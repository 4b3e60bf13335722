"""Rows far longer than the memory for activations: bytes and peaks of the sweep by chunk. The long forms are soaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.tiny_models import LLAMA
from headrace.helpers.training import tiny_leases
from headrace.kernels.api import Packing
from headrace.storage.build import open_stack
from headrace.storage.config import TiersConfig
from headrace.storage.core.records import Medium
from headrace.storage.stack import TierStack
from headrace.storage.transfer_log import TransferLog
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.by_layer import ByLayer
from headrace.workers.memory.chunk_plan import KvBytes, KvShape, kv_bytes
from headrace.workers.memory.chunk_sweep import ByChunk, apply_chunks
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import MemoryPlan, Residence, Stretch
from headrace.workers.memory.policy import apply_memory, skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.model.config import ModelConfig
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.program import RowPart

# Attention is most of the work at these lengths: one narrow head.
NARROW = replace(LLAMA, vocab_size=64, num_layers=2, num_heads=1, num_kv_heads=1, intermediate_size=32)
# The model of `make train`, with the vocabulary of its data.
DEFAULT = replace(
    NARROW,
    name="llama_5m",
    vocab_size=8192,
    hidden_size=256,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=768,
    tie_embeddings=True,
)
MIB = 1 << 20
SOAK = pytest.mark.soak


@pytest.fixture
def both_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """For the long forms: short rows leave a second thread nothing but to wait for the first."""
    torch.set_num_threads(2 if request.node.get_closest_marker("soak") else 1)
    yield
    torch.set_num_threads(1)


@contextmanager
def tiers(folder: Path, host_bytes: int, ssd_bytes: int) -> Iterator[TierStack]:
    """A host slab and a file on the drive."""
    with (
        tiny_leases(folder, host_bytes=host_bytes + MIB, ssd_bytes=ssd_bytes + MIB) as leases,
        closing(open_stack(leases[0], TiersConfig(), device=torch.device("cpu"), log=TransferLog())) as opened,
    ):
        yield opened


def plan_of(model: Decoder, preset: str, chunk: int, kv: tuple[Stretch, ...] = ()) -> MemoryPlan:
    return preset_plan(preset, skeletons_of(model.blocks), choices=Choices(chunk_size=chunk, kv=kv))


def row_of(num_tokens: int, vocab_size: int) -> TokenBatch:
    tokens = torch.randint(0, vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(1))
    return TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([num_tokens]))


def model_of(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    model.init_weights(0)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    return model


def sweep_of(model: Decoder, plan: MemoryPlan, stack: TierStack | None, meter: DeviceMeter | None = None) -> ByChunk:
    handle = apply_chunks(model.blocks, plan, stack, meter=meter, norm=model.norm)
    return ByChunk(model, handle, meter, loss_tile=plan.cuts.chunks[0], itemsize=4)


def bytes_of(config: ModelConfig, plan: MemoryPlan, num_tokens: int) -> KvBytes:
    shape = KvShape(config.num_layers, 1, num_tokens, config.num_kv_heads * config.head_size, 4)
    return kv_bytes(shape, plan.cuts, plan.kv, plan.kv_grads)


def peak_of_step(num_tokens: int, chunk: int, folder: Path) -> int:
    """Most bytes of live tensors in a step with the older half of the keys on the host, the others on the drive."""
    model, batch, meter = model_of(NARROW), row_of(num_tokens, NARROW.vocab_size), DeviceMeter()
    half = num_tokens // 2
    plan = plan_of(model, "chunk_auto", chunk, (Stretch(0, half, Residence.host), Stretch(half, None, Residence.ssd)))
    wanted = bytes_of(NARROW, plan, num_tokens)
    apart = [*model.parameters(), *(param.grad for param in model.parameters()), batch.tokens, batch.targets]
    with (
        tiers(folder, wanted.slots[Medium.host], wanted.slots[Medium.ssd]) as stack,
        closing(sweep_of(model, plan, stack, meter)) as sweep,
        LiveBytes(apart) as live,
    ):
        loss = sweep.forward_backward(batch, num_tokens, step=0, micro_batch=0)
        for medium, found in stack.stats().items():
            assert (found.stored_bytes, found.loaded_bytes) == (wanted.stored[medium], wanted.loaded[medium])
            assert found.used_bytes == 0
    assert torch.isfinite(loss)
    return live.peak


@pytest.mark.parametrize(
    ("num_tokens", "chunk"),
    [
        (320, 32),
        pytest.param(1 << 14, 1024, marks=SOAK),
        pytest.param(1 << 16, 2048, marks=SOAK),
        pytest.param(1 << 18, 4096, marks=SOAK),
    ],
)
def test_device_bytes_do_not_grow_with_the_row(num_tokens: int, chunk: int, tmp_path: Path, both_cores: None) -> None:
    """Those of a row of eight chunks. OOMB's grow by 17 to 139 MB for 10,000 tokens of a 7B model."""
    assert peak_of_step(num_tokens, chunk, tmp_path) == peak_of_step(8 * chunk, chunk, tmp_path)


@pytest.mark.parametrize(("num_tokens", "chunk"), [(512, 32), pytest.param(1 << 20, 1024, marks=SOAK)])
def test_the_last_chunks_of_a_row_whose_keys_wait_on_the_drive(
    num_tokens: int, chunk: int, tmp_path: Path, both_cores: None
) -> None:
    """The end of stage 1 is made up: random keys and values of all earlier tokens stand on the SSD. Bytes and peak."""
    model, batch, meter = model_of(NARROW), row_of(num_tokens, NARROW.vocab_size), DeviceMeter()
    plan = plan_of(model, "chunk_ssd", chunk)
    wanted = bytes_of(NARROW, plan, num_tokens)
    apart = [*model.parameters(), *(param.grad for param in model.parameters()), batch.tokens, batch.targets]
    of_block = 2 * chunk * NARROW.num_kv_heads * NARROW.head_size * 4
    num_blocks, num_chunks = num_tokens // chunk, 3
    with (
        tiers(tmp_path, 0, wanted.slots[Medium.ssd]) as stack,
        closing(sweep_of(model, plan, stack, meter)) as sweep,
    ):
        handle = sweep._handle
        handle.open(num_tokens, 0)
        keys = handle._keys
        fill_with_random_keys(sweep, batch, num_blocks - 1, chunk)
        meter.reset_peak()
        before = stack.stats()[Medium.ssd]
        with meter, LiveBytes(apart) as live:
            for number in reversed(range(num_blocks - num_chunks, num_blocks)):
                loss = sweep._forward(batch, (number * chunk, (number + 1) * chunk))
                (loss / num_tokens).backward()
        keys.grads.settle()  # the last stores may be under way, and count when they are done
        after = stack.stats()[Medium.ssd]
        later = sum(range(num_blocks - num_chunks, num_blocks))  # blocks before each of these chunks
        layers = NARROW.num_layers
        # Forward and backward read the keys of all earlier blocks; each chunk but the last reads its own again.
        assert after.loaded_bytes - before.loaded_bytes == layers * of_block * (
            2 * later + (num_chunks - 1) + later - (num_blocks - 1) + (num_chunks - 1)
        )
        assert after.stored_bytes - before.stored_bytes == layers * of_block * later
        assert live.peak < 2 * peak_of_step(4 * chunk, chunk, tmp_path / "short")
        assert len(keys.kv.of_layer(0, 0)) == num_blocks - num_chunks


def fill_with_random_keys(sweep: ByChunk, batch: TokenBatch, num_blocks: int, chunk: int) -> None:
    """Blocks of keys and values, one for each chunk, written and sent away as stage 1 does it."""
    handle, num_tokens = sweep._handle, batch.tokens.shape[1]
    draw, heads = torch.Generator().manual_seed(2), (NARROW.num_kv_heads, NARROW.head_size)
    for number in range(num_blocks):
        span = (number * chunk, (number + 1) * chunk)
        handle.enter(RowPart(span, num_tokens, is_for_keys=True), None, hands_over=False)
        for layer in range(NARROW.num_layers):
            k, v = (torch.randn(1, chunk, *heads, generator=draw) for _ in range(2))
            handle._keys.append(layer, k, v)
            handle._keys.leave(layer)
    handle._keys.kv.settle()


@SOAK
def test_the_default_model_at_64k_in_the_memory_of_4k(tmp_path: Path, both_cores: None) -> None:
    """The device budget is what a row of 4,096 tokens takes with everything kept; at 16K the gradients are those of
    the sweep by layer."""
    model = model_of(DEFAULT)
    skeletons = skeletons_of(model.blocks)

    def gradients(num_tokens: int, plan: MemoryPlan, meter: DeviceMeter) -> tuple[float, list[torch.Tensor]]:
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        batch = row_of(num_tokens, DEFAULT.vocab_size)
        room = 2 * 6 * DEFAULT.num_layers * num_tokens * DEFAULT.num_kv_heads * DEFAULT.head_size * 4
        with tiers(tmp_path, room, MIB) as stack:
            if plan.cuts.chunks:
                sweep: ByChunk | ByLayer = sweep_of(model, plan, stack, meter)
            else:
                handle = apply_memory(model.blocks, plan, stack, meter=meter, norm=model.norm)
                sweep = ByLayer(model, handle, meter, loss_tile=1024, itemsize=4)
            with closing(sweep):
                loss = sweep.forward_backward(batch, num_tokens, step=0, micro_batch=0)
        return float(loss) / num_tokens, [param.grad for param in model.parameters()]

    kept = DeviceMeter()
    gradients(4096, preset_plan("keep", skeletons), kept)
    by_chunk = plan_of(model, "chunk_host", 1024)
    loss, found = gradients(1 << 14, by_chunk, DeviceMeter(kept.peak_bytes))
    wanted_loss, wanted = gradients(1 << 14, preset_plan("recompute", skeletons), DeviceMeter())
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)) <= 5e-5
    loss, _ = gradients(1 << 16, by_chunk, DeviceMeter(kept.peak_bytes))
    assert loss == pytest.approx(wanted_loss, rel=0.05)
