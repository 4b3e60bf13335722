"""Bytes and FLOPs of one micro-batch, from the shape of the decoder (workers/model/decoder.py). No torch.

FLOPs are those of workers/telemetry/flops.py, attention counted causally and each row as one document.
"""

from __future__ import annotations

from headrace.platform.planning.hardware import DeviceClass
from headrace.platform.planning.predict import StepCost
from headrace.workers.model.config import ModelConfig
from headrace.workers.telemetry.flops import block_flops, causal_pairs, head_flops

# AdamW on fp32 master weights: weight, gradient and two moments, 4 bytes each.
STATE_BYTES_PER_PARAM = 16
# Blocks whose parameters FSDP2 holds unsharded at once: the one at work and the one prefetched.
UNSHARDED_BLOCKS = 2
# Of an H100 or H200, the most of any device we know: flash's backward spreads over so many.
MULTIPROCESSORS = 132
# What a process holds in host memory before it has a tensor: interpreter, torch, and on CUDA the driver's part.
RANK_BYTES = {DeviceClass.cpu: 512 << 20, DeviceClass.cuda: 3 << 30}


def step_cost(
    model: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    itemsize: int,
    device_class: DeviceClass,
    num_shards: int = 1,
    tensor_degree: int = 1,
    sequence_degree: int = 1,
    loss_tile: int = 1024,
    packed: bool = False,
    num_replicas: int = 1,
    deterministic: bool = False,
) -> StepCost:
    """Cost of one micro-batch on one rank.

    Args:
        itemsize: bytes of the compute dtype.
        num_shards: ranks that weights, gradients and optimizer state are sharded over.
        tensor_degree: ranks that share every block's weights, and its tokens between them (sequence parallelism).
        sequence_degree: ranks that share the tokens of a sequence (Ulysses x ring).
        packed: rows hold several documents; rotary tables are then of every row.
        num_replicas: copies of the sharded weights that are kept.
        deterministic: attention's backward sums in a fixed order, which takes more memory on cuda.

    Returns:
        On cpu: saved tensors only, as DeviceMeter counts them; the rest is in process_bytes. On cuda: also weights,
        gradients, optimizer state and what a block or the loss needs while it runs, as the allocator counts them.
    """
    degree = tensor_degree * sequence_degree
    tokens = -(-batch_size * seq_len // degree)
    pairs = batch_size * causal_pairs(seq_len, model.sliding_window) // degree
    on_cuda = device_class is DeviceClass.cuda
    saved = tokens * sum(saved_per_token(model, itemsize).values())
    # Tokens and rope tables: one set for all layers, there from first to last.
    shared = tokens * 8 + 2 * (tokens if packed else seq_len) * model.head_size * itemsize
    state = state_bytes(model, itemsize, num_shards * tensor_degree)
    state += reduction_bytes(model, num_shards, num_replicas) // tensor_degree
    block_transient = tokens * 2 * model.intermediate_size * itemsize
    if on_cuda:
        workspace = attention_workspace_bytes(model, tokens, itemsize, degree=degree, deterministic=deterministic)
        # The two are not there together. A freed tensor leaves a hole in its segment that a larger one does not fit.
        block_transient = max(block_transient, workspace) + tokens * model.intermediate_size * itemsize
    # Logits in fp32 and their gradient in the compute dtype, and the head's weight gradient in fp32.
    head_transient = min(loss_tile, tokens) * model.vocab_size * (4 + itemsize)
    head_transient += 4 * model.vocab_size * model.hidden_size
    in_process = 0 if on_cuda else state + max(block_transient, head_transient)
    return StepCost(
        num_layers=model.num_layers,
        input_bytes=tokens * model.hidden_size * itemsize,
        saved_bytes=saved,
        head_bytes=tokens * sum(head_saved_per_token(model, itemsize).values()),
        block_flops=block_flops(model, tokens, pairs),
        head_flops=head_flops(model, tokens),
        fixed_bytes=shared + (state if on_cuda else 0),
        block_transient_bytes=block_transient if on_cuda else 0,
        head_transient_bytes=head_transient if on_cuda else 0,
        input_is_saved=norm_saves_its_input(itemsize),
        process_bytes=RANK_BYTES[device_class] + in_process,
    )


def saved_per_token(model: ModelConfig, itemsize: int) -> dict[str, int]:
    """Bytes per token of every tensor that autograd saves in one block, with the kernels of kernels/reference."""
    hidden, mlp = model.hidden_size * itemsize, model.intermediate_size * itemsize
    q, kv = (heads * model.head_size * itemsize for heads in (model.num_heads, model.num_kv_heads))
    norm_input = hidden if norm_saves_its_input(itemsize) else 0
    norm = norm_saved_per_token(model.hidden_size, itemsize)
    qk_norm = 0
    if model.qk_norm:
        heads = model.num_heads + model.num_kv_heads
        qk_norm = heads * norm_saved_per_token(model.head_size, itemsize)
        qk_norm += q + kv if norm_saves_its_input(itemsize) else 0
    return {
        "layer input": norm_input,
        "input norm": norm,
        "input norm output": hidden,
        "q, k before their norms, and what the norms save": qk_norm,
        "q, k, v": q + 2 * kv,
        "attention output and LSE": q + 4 * model.num_heads,
        "attention residual": norm_input,
        "post-attention norm": norm,
        "post-attention norm output": hidden,
        "gate, up": 2 * mlp,
        "silu(gate)": mlp,
        "activation output": mlp,
    }


def norm_saves_its_input(itemsize: int) -> bool:
    """Whether RMSNorm saves its input itself (fp32), or only the fp32 copy of it that it computes with."""
    return itemsize >= 4


def norm_saved_per_token(width: int, itemsize: int) -> int:
    """Bytes that RMSNorm saves per row of `width` beside its input and its output: fp32 copy, normalised row, scale."""
    upcast = 0 if norm_saves_its_input(itemsize) else 4 * width
    return upcast + width * itemsize + max(itemsize, 4)


def head_saved_per_token(model: ModelConfig, itemsize: int) -> dict[str, int]:
    """Bytes per token saved outside of the blocks when the forward pass is over."""
    hidden = model.hidden_size * itemsize
    return {
        "last hidden state": hidden if norm_saves_its_input(itemsize) else 0,
        "final norm": norm_saved_per_token(model.hidden_size, itemsize),
        "gradient of the final norm's output, which the loss makes in forward": hidden,
    }


def attention_workspace_bytes(
    model: ModelConfig, tokens: int, itemsize: int, *, degree: int, deterministic: bool
) -> int:
    """What flash attention's backward needs beside its inputs and outputs, on one rank.

    The gradient of q in fp32: one copy, or, where sums keep their order, as many as fill the multiprocessors with one
    sequence's heads. With grouped queries also the gradients of k and v per query head. (FlashAttention-2,
    flash_api.cpp, mha_varlen_bwd.)
    """
    copies = -(-MULTIPROCESSORS // max(1, model.num_heads // degree)) if deterministic else 1
    each = tokens * model.num_heads * model.head_size
    grouped = 2 * each * itemsize if model.num_kv_heads < model.num_heads else 0
    return 4 * copies * each + grouped


def _root_and_block(model: ModelConfig) -> tuple[int, int]:
    """Parameters outside of the blocks, and in one block."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    return embeddings, (model.num_params() - embeddings) // model.num_layers


def reduction_bytes(model: ModelConfig, num_shards: int, num_replicas: int) -> int:
    """Whole fp32 gradients on their way into the reduction: a block's and, at the end of backward, the embeddings'.

    torch makes them on a stream of their own. The allocator keeps a pool for each stream and gives nothing of one to
    another, so they add to the peak whenever that is. Replicas of whole weights take a divided copy too.
    """
    root, block = _root_and_block(model)
    copies = 2 if num_shards == 1 and num_replicas > 1 else 1
    return 4 * (copies * root + block)


def state_bytes(model: ModelConfig, itemsize: int, num_shards: int) -> int:
    """Weights, gradients and optimizer state of one rank, with the blocks that FSDP2 holds whole."""
    params = model.num_params()
    embeddings, block = _root_and_block(model)
    # The root's own parameters (embeddings, final norm) stay whole from forward to backward, with a gradient.
    return STATE_BYTES_PER_PARAM * params // num_shards + itemsize * (UNSHARDED_BLOCKS * 2 * block + 2 * embeddings)
