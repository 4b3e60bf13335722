"""Bytes and FLOPs of one micro-batch, from the shape of the decoder (workers/model/decoder.py). No torch.

FLOPs are those of workers/telemetry/flops.py, attention counted causally and each row as one document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import repeat

from headrace.kernels.codecs.config import plain_traffic
from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import BlockCost, StepCost
from headrace.storage.core.records import Medium
from headrace.workers.memory.footprint import Footprint, footprint
from headrace.workers.memory.head_bytes import head_transient_bytes, tied_head_bytes
from headrace.workers.memory.plan import DEFAULT_TOKEN_TILE, HELD, Cuts, LayerPlan, Residence
from headrace.workers.memory.schedule import Schedule, schedule_of
from headrace.workers.model.adapter import adapted, block_skeletons, num_adapter_params, num_params, weights_of
from headrace.workers.model.config import ATTENTION, NO_ADAPTER, AdapterConfig, ModelConfig
from headrace.workers.model.skeleton import Skeleton, Span, norm_skeleton
from headrace.workers.model.tensor_cut import shared
from headrace.workers.telemetry.flops import adapter_flops, blocks_flops, causal_pairs, head_flops

# AdamW on fp32 master weights: weight, gradient and two moments, 4 bytes each.
STATE_BYTES_PER_PARAM = 16
FROZEN_BYTES_PER_PARAM = 4
# Of the number of a token.
TOKEN_BYTES = 8
# Blocks whose parameters FSDP2 holds unsharded at once: the one at work and the one prefetched.
UNSHARDED_BLOCKS = 2
# Of an H100 or H200, the most of any device we know: flash's backward spreads over so many.
MULTIPROCESSORS = 132
# What a process holds in host memory before it has a tensor: interpreter, torch, and on CUDA the driver's part.
RANK_BYTES = {DeviceClass.cpu: 512 << 20, DeviceClass.cuda: 3 << 30}

# Tokens that the token segments of a block work on at once. A GPU writes a block's weight gradients once per tile.
TOKEN_TILE = {DeviceClass.cpu: DEFAULT_TOKEN_TILE, DeviceClass.cuda: 8192}


def default_cuts(device_class: DeviceClass) -> Cuts:
    """Where plans for such a device cut the tokens."""
    return Cuts(TOKEN_TILE[device_class])


@dataclass(frozen=True)
class BlockShape:
    """A block of the model on one rank: what a layer plan is priced for.

    Args:
        rows: tokens of a row that the rank has.
        pairs: (query, key) pairs that the queries of a span of these tokens see, over the whole batch.
        device_class: where it runs.
        shares: micro-batches of which a pipeline's rank holds what blocks leave between forward and backward, that at
            work among them, and what they leave in the queue; in shares of its blocks, of all moments.
        splits: whether gradients of weights come in passes of their own.
        flops_per_byte: that are computed while a byte of the device's memory is read or written.
    """

    schedule: Schedule
    cuts: Cuts
    batch_size: int
    rows: int
    itemsize: int
    pairs: Callable[[Span], float]
    device_class: DeviceClass
    shares: tuple[tuple[float, float], ...] = ((1.0, 0.0),)
    splits: bool = False
    flops_per_byte: float = 0.0

    def footprint(self, plan: LayerPlan) -> Footprint:
        """The block's bytes under a layer plan, for one micro-batch."""
        return footprint(
            self.schedule,
            plan,
            self.cuts,
            batch_size=self.batch_size,
            num_tokens=self.rows,
            itemsize=self.itemsize,
            casts_products=self.device_class is DeviceClass.cpu,
            splits=self.splits,
        )

    def cost(self, plan: LayerPlan) -> BlockCost:
        """What the block costs under a layer plan. In a pipeline all blocks of a rank count as if they were alike."""
        found = self.footprint(plan)
        flops = sum(
            segment.flops(self.batch_size * (span[1] - span[0]), self.pairs(span)) for segment, span in found.rerun
        )
        others = math.ceil(max((passes - 1) * found.held + queued * found.queued for passes, queued in self.shares))
        in_flight = math.ceil(max(passes for passes, _ in self.shares))
        codec_flops = self.flops_per_byte * self._codec_bytes(plan)
        return BlockCost(
            forward=found.forward + others,
            backward=(max(found.beside_sums, found.split) if self.splits else found.backward) + others,
            held=found.held + others,
            host=found.away[Medium.host],
            ssd=found.away[Medium.ssd],
            host_slots=in_flight * found.slots[Medium.host],
            ssd_slots=in_flight * found.slots[Medium.ssd],
            rerun_flops=flops + codec_flops,
            codec_flops=codec_flops,
        )

    def _codec_bytes(self, plan: LayerPlan) -> int:
        """What the codec reads and writes: all that is held of a coded tensor is encoded once and decoded once."""
        skeleton, total = self.schedule.skeleton, 0
        if skeleton.codec is None:
            return 0
        for name in skeleton.coded:
            num_tokens = sum(end - begin for begin, end in plan.spans(name, self.rows, *HELD))
            total += num_tokens * sum(plain_traffic(skeleton.codec, skeleton.tensors[name].width, self.itemsize))
        return self.batch_size * total


def block_shape(
    model: ModelConfig,
    skeleton: Skeleton,
    *,
    batch_size: int,
    seq_len: int,
    itemsize: int,
    cuts: Cuts,
    device_class: DeviceClass,
    degree: int = 1,
) -> BlockShape:
    """Of the blocks of the model with this skeleton, whose tokens `degree` ranks share."""

    def pairs(span: Span) -> float:
        begin, end = (causal_pairs(min(seq_len, at * degree), model.sliding_window) for at in span)
        return batch_size * (end - begin) / degree

    rows = -(-seq_len // degree)
    return BlockShape(schedule_of(skeleton), cuts, batch_size, rows, itemsize, pairs, device_class)


def on_rank(skeletons: Iterable[Skeleton], cuts: Cuts, *, tensor: int, ulysses: int, ring: int) -> list[Skeleton]:
    """Blocks whose weights and rows so many ranks share, with the cuts' head groups; equal blocks stay one object."""
    return cuts.skeletons(shared(each, tensor=tensor, ulysses=ulysses, ring=ring) for each in skeletons)


def step_cost(
    model: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    itemsize: int,
    device_class: DeviceClass,
    cuts: Cuts | None = None,
    num_shards: int = 1,
    tensor_degree: int = 1,
    sequence_degree: int = 1,
    ulysses: int = 1,
    loss_tile: int = 1024,
    packed: bool = False,
    num_replicas: int = 1,
    deterministic: bool = False,
    adapter: AdapterConfig = NO_ADAPTER,
    num_passes: int = 1,
    has_both_ends: bool = True,
) -> StepCost:
    """Cost of one micro-batch on one rank.

    Args:
        itemsize: bytes of the compute dtype.
        cuts: where plans cut the tokens; None: default_cuts.
        num_shards: ranks that weights, gradients and optimizer state are sharded over.
        tensor_degree: ranks that share every block's weights, and its tokens between them (sequence parallelism).
        sequence_degree: ranks that share the tokens of a sequence (Ulysses x ring); `ulysses` of them share its heads.
        packed: rows hold several documents; rotary tables are then of every row.
        num_replicas: copies of the sharded weights that are kept.
        deterministic: attention's backward sums in a fixed order, which takes more memory on cuda.
        adapter: what is trained. A frozen weight has neither gradient nor moments.
        num_passes: that are open at once, of other micro-batches or stages.
        has_both_ends: whether look-up and head are on one rank; of a pipeline of several ranks they are not.

    Returns:
        On cpu: all tensors of the step but weights, gradients and optimizer state, which are in process_bytes. On cuda:
        those too, as the allocator counts them.
    """
    degree, on_cuda = tensor_degree * sequence_degree, device_class is DeviceClass.cuda
    tokens = -(-batch_size * seq_len // degree)
    pairs = batch_size * causal_pairs(seq_len, model.sliding_window) // degree
    cuts = cuts or default_cuts(device_class)
    degrees = {"tensor": tensor_degree, "ulysses": ulysses, "ring": sequence_degree // ulysses}
    skeletons = on_rank(block_skeletons(model, adapter), cuts, **degrees)
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "itemsize": itemsize, "degree": degree}
    shape = block_shape(model, skeletons[0], cuts=cuts, device_class=device_class, **sizes)
    norm = replace(shape, schedule=schedule_of(adapted(norm_skeleton(model.hidden_size), adapter)))
    # Tensor ranks have the tokens and rope tables of all of them, and look up and score them with their own rows.
    scored, vocab_size = tokens * tensor_degree, -(-model.vocab_size // tensor_degree)
    # Tokens and rope tables of every pass that is open: one set for all layers, there from first to last.
    token_bytes, table_bytes = scored * TOKEN_BYTES, 2 * (scored if packed else seq_len) * model.head_size * itemsize
    state = state_bytes(model, itemsize, num_shards, adapter, tensor_degree)
    state += reduction_bytes(model, num_shards, num_replicas, adapter) // tensor_degree
    at_work = tied_head_bytes(vocab_size, model.hidden_size, itemsize) * (has_both_ends and is_tied(model, adapter))
    if on_cuda:
        heads = {"degree": degree, "head_groups": cuts.head_groups}
        at_work += attention_workspace_bytes(model, tokens, itemsize, **heads, deterministic=deterministic)
        # A freed tensor leaves a hole in its segment that a larger one does not fit.
        at_work += min(tokens, batch_size * cuts.token_tile) * model.intermediate_size * itemsize
    forward_flops, backward_flops = blocks_flops(skeletons, tokens, pairs)
    head = {"num_tokens": scored, "loss_tile": loss_tile, "itemsize": itemsize}
    return StepCost(
        num_layers=model.num_layers,
        norm=norm.cost(LayerPlan.of(x=Residence.hbm)),
        head_bytes=scored * model.hidden_size * itemsize,
        block_flops=forward_flops / model.num_layers,
        block_backward_flops=(backward_flops + sum(map(adapter_flops, skeletons, repeat(tokens)))) / model.num_layers,
        head_flops=head_flops(model, tokens),
        head_backward_flops=head_flops(model, tokens) * (1 if adapter.is_on else 2),
        fixed_bytes=num_passes * (token_bytes + table_bytes) + (state if on_cuda else 0),
        table_bytes=table_bytes,
        token_bytes=token_bytes,
        block_transient_bytes=at_work,
        head_transient_bytes=head_transient_bytes(
            vocab_size, model.hidden_size, **head, casts_products=not on_cuda, is_frozen=adapter.is_on
        ),
        process_bytes=RANK_BYTES[device_class] + (0 if on_cuda else state),
    )


def is_tied(model: ModelConfig, adapter: AdapterConfig) -> bool:
    """Whether the head is the embedding and trained: two gradients are added up then."""
    return model.tie_embeddings and not adapter.is_on


def attention_workspace_bytes(
    model: ModelConfig, tokens: int, itemsize: int, *, degree: int, head_groups: int = 1, deterministic: bool
) -> int:
    """What flash attention's backward of one head group needs beside its inputs and outputs, on one rank.

    The gradient of q in fp32: one copy, or, where sums keep their order, as many as fill the multiprocessors with one
    sequence's heads. With grouped queries also the gradients of k and v per query head. (FlashAttention-2,
    flash_api.cpp, mha_varlen_bwd.)
    """
    if ATTENTION not in model.mixers:
        return 0
    copies = -(-MULTIPROCESSORS // max(1, model.num_heads // (degree * head_groups))) if deterministic else 1
    each = tokens * model.num_heads * model.head_size // head_groups
    grouped = 2 * each * itemsize if model.num_kv_heads < model.num_heads else 0
    return 4 * copies * each + grouped


def _root_and_block(model: ModelConfig) -> tuple[int, int]:
    """Parameters outside of the blocks, and in the largest block."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings, max(weights_of(skeleton) for skeleton in block_skeletons(model))


def reduction_bytes(model: ModelConfig, num_shards: int, num_replicas: int, adapter: AdapterConfig = NO_ADAPTER) -> int:
    """Whole fp32 gradients on their way into the reduction: a block's and, at the end of backward, the embeddings'.

    torch makes them on a stream of their own. The allocator keeps a pool for each stream and gives nothing of one to
    another, so they add to the peak whenever that is. Replicas of whole weights take a divided copy too.
    """
    root, block = _root_and_block(model)
    if adapter.is_on:
        root, block = 0, num_adapter_params(model, adapter) // model.num_layers
    copies = 2 if num_shards == 1 and num_replicas > 1 else 1
    return 4 * (copies * root + block)


def state_bytes(
    model: ModelConfig, itemsize: int, num_shards: int, adapter: AdapterConfig = NO_ADAPTER, tensor_degree: int = 1
) -> int:
    """Weights, gradients and optimizer state of one rank, with the blocks that FSDP2 holds whole.

    Norms and the halves of adapters that every tensor rank has whole count as if they were shared, too.
    """
    params = num_params(model) // tensor_degree
    embeddings, block = (size // tensor_degree for size in _root_and_block(model))
    if adapter.is_on:
        trained = num_adapter_params(model, adapter) // tensor_degree
        each = trained // model.num_layers
        state = FROZEN_BYTES_PER_PARAM * params + STATE_BYTES_PER_PARAM * trained
        return state // num_shards + itemsize * (UNSHARDED_BLOCKS * (block + 2 * each) + embeddings)
    # The root's own parameters (embeddings, final norm) stay whole from forward to backward, with a gradient.
    return STATE_BYTES_PER_PARAM * params // num_shards + itemsize * (UNSHARDED_BLOCKS * 2 * block + 2 * embeddings)
