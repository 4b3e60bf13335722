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


def step_cost(
    model: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    itemsize: int,
    device_class: DeviceClass,
    num_shards: int = 1,
    loss_tile: int = 1024,
) -> StepCost:
    """Cost of one micro-batch.

    Args:
        itemsize: bytes of the compute dtype.
        num_shards: ranks that weights, gradients and optimizer state are sharded over.

    Returns:
        On cpu: saved tensors only, as DeviceMeter counts them. On cuda: also weights, gradients, optimizer state and
        what a block or the loss needs while it runs, as the allocator counts them.
    """
    tokens = batch_size * seq_len
    on_cuda = device_class is DeviceClass.cuda
    saved = sum(saved_per_token(model, itemsize, fused=on_cuda).values())
    tile_tokens = min(loss_tile, tokens)
    # Tokens, targets and rope tables: one set for all layers, there from first to last.
    shared = 2 * tokens * 8 + 2 * seq_len * model.head_size * itemsize
    state = state_bytes(model, itemsize, num_shards) if on_cuda else 0
    return StepCost(
        num_layers=model.num_layers,
        input_bytes=tokens * model.hidden_size * itemsize,
        saved_bytes=tokens * saved,
        head_bytes=tokens * sum(head_saved_per_token(model, itemsize, fused=on_cuda).values()),
        block_flops=block_flops(model, tokens, batch_size * causal_pairs(seq_len, model.sliding_window)),
        head_flops=head_flops(model, tokens),
        fixed_bytes=shared + state,
        block_transient_bytes=tokens * 2 * model.intermediate_size * itemsize if on_cuda else 0,
        head_transient_bytes=2 * tile_tokens * model.vocab_size * 4 if on_cuda else 0,
    )


def saved_per_token(model: ModelConfig, itemsize: int, *, fused: bool) -> dict[str, int]:
    """Bytes per token of every tensor that autograd saves in one block, its input included.

    Args:
        fused: kernels of their own for norm, rope and attention (CUDA); otherwise the reference of kernels/reference,
            which saves what its single operations need.
    """
    hidden, mlp = model.hidden_size * itemsize, model.intermediate_size * itemsize
    q, kv = (heads * model.head_size * itemsize for heads in (model.num_heads, model.num_kv_heads))
    norm = norm_saved_per_token(model.hidden_size, itemsize, fused=fused)
    qk_norm = 0
    if model.qk_norm:
        heads = model.num_heads + model.num_kv_heads
        qk_norm = q + kv + heads * norm_saved_per_token(model.head_size, itemsize, fused=fused)
    return {
        "layer input": hidden,
        "input norm": norm,
        "input norm output": hidden,
        "q, k before their norms, and what the norms save": qk_norm,
        "q, k, v": q + 2 * kv,
        "attention output and LSE": q + 4 * model.num_heads,
        "attention residual": hidden,
        "post-attention norm": norm,
        "post-attention norm output": hidden,
        "gate, up": 2 * mlp,
        "silu(gate)": 0 if fused else mlp,
        "activation output": mlp,
    }


def norm_saved_per_token(width: int, itemsize: int, *, fused: bool) -> int:
    """Bytes that RMSNorm saves per row of `width` beside its input and its output."""
    if fused:
        return 4
    upcast = 4 * width if itemsize < 4 else 0
    return upcast + width * itemsize + max(itemsize, 4)


def head_saved_per_token(model: ModelConfig, itemsize: int, *, fused: bool) -> dict[str, int]:
    """Bytes per token saved outside of the blocks when the forward pass is over."""
    hidden = model.hidden_size * itemsize
    return {
        "last hidden state": hidden,
        "final norm": norm_saved_per_token(model.hidden_size, itemsize, fused=fused),
        "final norm output": hidden,
        "loss": 4,
    }


def state_bytes(model: ModelConfig, itemsize: int, num_shards: int) -> int:
    """Weights, gradients and optimizer state of one rank, with the blocks that FSDP2 holds whole."""
    params = model.num_params()
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    block = (params - embeddings) // model.num_layers
    # The root's own parameters (embeddings, final norm) stay whole from forward to backward, with a gradient.
    return STATE_BYTES_PER_PARAM * params // num_shards + itemsize * (UNSHARDED_BLOCKS * 2 * block + 2 * embeddings)
