"""The program of the dense decoder block: Llama, Qwen2, Qwen3 and Mistral."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headrace.kernels.api import (
    Operators,
    apply_rope,
    qk_norm_rope,
    qk_norm_rope_backward,
    rms_norm_backward,
    rms_norm_scaled,
    swiglu,
    swiglu_backward,
)
from headrace.kernels.attention import AttentionSpec, spec_for
from headrace.workers.model.config import ATTENTION, ModelConfig
from headrace.workers.model.mixers.registry import mixer_named
from headrace.workers.model.program import (
    Gradients,
    LinearRule,
    Made,
    MixRule,
    Pieces,
    PointwiseRule,
    Program,
    Rule,
    Shared,
)
from headrace.workers.model.skeleton import Segment, Span, dense_skeleton, norm_skeleton

At = tuple[Span, Shared]


def dense_program(config: ModelConfig, operators: Operators, mixer: str = ATTENTION) -> Program:
    """The segments of `dense_skeleton` over the parameters of `workers/model/layers.py`'s Block."""
    skeleton = dense_skeleton(config, mixer)
    norm1, *mixing, norm2, gate_up, act, down = skeleton.segments

    def activation(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
        return (swiglu(*reads, backend=operators.kernels),)

    def activation_back(values: Pieces, params: Pieces, grads: Pieces, at: At, trained: bool) -> Gradients:
        return swiglu_backward(*grads, *values, backend=operators.kernels), ()

    rules: tuple[Rule, ...] = (
        _norm_rule(norm1, "input_layernorm.weight", config, operators),
        *mixer_named(mixer).rules(config, operators, tuple(mixing)),
        _norm_rule(norm2, "post_attention_layernorm.weight", config, operators),
        LinearRule(gate_up, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), (None, None)),
        PointwiseRule(act, (), activation, activation_back),
        LinearRule(down, ("mlp.down_proj.weight",), (None,)),
    )
    return Program(skeleton, rules)


def attention_rules(config: ModelConfig, operators: Operators, segments: Sequence[Segment]) -> tuple[Rule, ...]:
    """Of attention's part of a block, over the parameters of layers.py's Attention."""
    qkv, rope, mix, o = segments
    head_size = config.head_size
    projections = ("q_proj", "k_proj", "v_proj")

    def spec(q: torch.Tensor, num_keys: int, first: int, shared: Shared) -> AttentionSpec:
        return spec_for(
            q,
            num_keys,
            scale=head_size**-0.5,
            operator=operators.attention,
            first_query=first,
            packing=shared.packing,
            window=config.sliding_window,
        )

    return (
        LinearRule(
            qkv,
            tuple(f"self_attn.{name}.weight" for name in projections),
            tuple(f"self_attn.{name}.bias" if config.qkv_bias else None for name in projections),
        ),
        _rope_rule(rope, config, operators),
        MixRule(mix, head_size, spec, config.sliding_window),
        LinearRule(o, ("self_attn.o_proj.weight",), (None,)),
    )


def norm_program(config: ModelConfig, operators: Operators) -> Program:
    """The segment of `norm_skeleton` over the weight of the decoder's final norm."""
    skeleton = norm_skeleton(config.hidden_size)
    return Program(skeleton, (_norm_rule(skeleton.segments[0], "weight", config, operators),))


def _norm_rule(segment: Segment, weight: str, config: ModelConfig, operators: Operators) -> PointwiseRule:
    eps, backend = config.rms_norm_eps, operators.kernels

    def norm(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
        return rms_norm_scaled(reads[0], params[0], eps, backend=backend)[: len(segment.made)]

    def norm_back(values: Pieces, params: Pieces, grads: Pieces, at: At, trained: bool) -> Gradients:
        x, *scale = values
        d_x, d_weight = rms_norm_backward(
            grads[0], x, params[0], eps, backend=backend, of_weight=trained, scale=scale[0] if scale else None
        )
        return (d_x,), (d_weight,)

    return PointwiseRule(segment, (weight,), norm, norm_back)


def _rope_rule(segment: Segment, config: ModelConfig, operators: Operators) -> PointwiseRule:
    """Rotation of q and k; with a norm of every head before it (Qwen3) where the model has one."""
    backend, head_size, eps = operators.kernels, config.head_size, config.rms_norm_eps

    def tables(span: Span, shared: Shared) -> Made:
        # A row of the tables holds as many tokens as one of q and k.
        return tuple(table.reshape(len(table), -1, head_size) for table in shared.tables(span))

    def heads(pieces: Pieces, table: torch.Tensor) -> Pieces:
        return [piece.reshape(len(piece), table.shape[1], -1, head_size) for piece in pieces]

    def flat(pieces: Pieces, span: Span) -> Made:
        return tuple(piece.reshape(len(piece), span[1] - span[0], -1) for piece in pieces)

    def normed(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
        (q_weight, k_weight), (cos, sin) = params, tables(span, shared)
        q, k = heads(reads, cos)
        return flat(qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps, backend=backend), span)

    def rotated(reads: Pieces, params: Pieces, span: Span, shared: Shared) -> Made:
        cos, sin = tables(span, shared)
        q, k = heads(reads, cos)
        return flat(apply_rope(q, k, cos, sin, backend=backend), span)

    def normed_back(values: Pieces, params: Pieces, grads: Pieces, at: At, trained: bool) -> Gradients:
        (q_weight, k_weight), (cos, sin) = params, tables(*at)
        (dq, dk), (q, k) = heads(grads, cos), heads(values, cos)
        of_heads, of_weights = qk_norm_rope_backward(
            (dq, dk), (q, k), (q_weight, k_weight), (cos, sin), eps, backend=backend, of_weights=trained
        )
        return flat(of_heads, at[0]), of_weights

    def rotated_back(values: Pieces, params: Pieces, grads: Pieces, at: At, trained: bool) -> Gradients:
        # The gradient of a rotation is the rotation by the negative angle.
        cos, sin = tables(*at)
        dq, dk = heads(grads, cos)
        return flat(apply_rope(dq, dk, cos, -sin, backend=backend), at[0]), ()

    if config.qk_norm:
        return PointwiseRule(segment, ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), normed, normed_back)
    return PointwiseRule(segment, (), rotated, rotated_back)
