"""The builds of every fused kernel, as they are launched.

    python -m headrace.helpers.kernel_builds

compiles them (builds.py) and prints one JSON row per kernel and architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

import torch

from headrace.helpers.builds import Build, compile_all, complaint, for_dtypes
from headrace.kernels.codecs.grid import EIGHT_BIT_LEVELS, FOUR_BIT_LEVELS
from headrace.kernels.fused import activation, codecs, loss, norm, pages, qk_norm, rope
from headrace.kernels.fused import codec_kernels as kernels
from headrace.kernels.loss.steps import FILTER_TILE

_STRIDES = [f"{x}_stride_{dim}" for x in "qk" for dim in ("batch", "token", "head")]
# Triton's types of the sizes and strides that the two forward kernels of RoPE take.
ROPE_STRIDES = dict.fromkeys(("num_tokens", *_STRIDES, "table_stride_batch", "table_stride_token"), "i64")


def all_builds() -> list[Build]:
    """The builds of every module that has a kernel."""
    parts = (activation_builds, codecs_builds, loss_builds, norm_builds, pages_builds, qk_norm_builds)
    return [build for part in (*parts, rope_builds) for build in part()]


def activation_builds() -> list[Build]:
    """Every activation; a narrow and a wide row differ in BLOCK alone."""
    names = ("width", "gate_stride", "up_stride")
    forward = {"gate_ptr": "*T", "up_ptr": "*T", "out_ptr": "*T", **dict.fromkeys(names, "i64")}
    backward = {f"{name}_ptr": "*T" for name in ("d_out", "gate", "up", "d_gate", "d_up")}
    backward |= dict.fromkeys(("d_out_stride", *names), "i64")
    found: list[Build] = []
    for form, dtypes in (("silu", ("bf16", "fp16")), ("gelu_tanh", ("bf16",)), ("gelu", ("fp32",))):
        constexprs = {"ACTIVATION": form, "BLOCK": activation.BLOCK}
        found += for_dtypes(f"glu_forward[{form}]", activation.glu_forward, forward, constexprs, dtypes=dtypes)
        found += for_dtypes(f"glu_backward[{form}]", activation.glu_backward, backward, constexprs, dtypes=dtypes)
    return found


def codecs_builds() -> list[Build]:
    """Every kernel in every dtype it takes; narrow rows, and wide ones of several tiles."""
    kept, sizes = {"codes_ptr": "*u8", "ranges_ptr": "*fp32"}, {"num_rows": "i64", "num_cols": "i64"}
    encoded = {"x_ptr": "*T", **kept, **sizes, "seed": "i64", "stream": "i32"}
    decoded = {**kept, "out_ptr": "*T", **sizes}
    narrow, wide = (
        dict(zip(("ROWS", "COLS"), codecs.tile_shape(cols), strict=True)) for cols in (128, 3 * codecs.MAX_TILE_COLS)
    )
    levels, groups = {"LEVELS": EIGHT_BIT_LEVELS}, {"LEVELS": FOUR_BIT_LEVELS, **codecs.GROUP_TILE}
    one, three = {**narrow, **levels, "NUM_TILES": 1}, {**wide, **levels, "NUM_TILES": 3}
    return [
        *for_dtypes("encode_rows", kernels.encode_rows_kernel, encoded, one),
        *for_dtypes("encode_rows wide", kernels.encode_rows_kernel, encoded, three, dtypes=("bf16",)),
        *for_dtypes("encode_groups", kernels.encode_groups_kernel, encoded, groups),
        *for_dtypes("decode_rows", kernels.decode_rows_kernel, decoded, wide),
        *for_dtypes("decode_groups", kernels.decode_groups_kernel, decoded, codecs.GROUP_TILE),
    ]


def loss_builds() -> list[Build]:
    """The kernels as the loss head launches them; T is the dtype of bias, class weight and output."""
    stats = dict.fromkeys(("logits", "largest", "sum_exp", "picked", "total"), "*fp32")
    stats |= {"labels": "*i64", "bias": "*T", "class_weight": "*T"}
    stats |= {"num_columns": "i32", "first": "i32", "softcap": "fp32"}
    gradient = dict.fromkeys(("logits", "lse", "softmax_scale", "label_scale", "smooth_scale"), "*fp32")
    gradient |= {"out": "*T", "class_weight": "*T", "labels": "*i64", "kept": "*i8"}
    gradient |= {"num_rows": "i32", "num_columns": "i32", "first": "i32", "softcap": "fp32", "filter_eps": "fp32"}
    found = []
    for form, is_on in (("", False), ("_full", True)):
        flags = {"HAS_CAP": is_on, "HAS_WEIGHT": is_on}
        constexprs = {**flags, "HAS_BIAS": is_on, "HAS_TOTAL": is_on, "NUM_TILES": 38, "COLUMNS": loss.STATS_COLUMNS}
        found += for_dtypes(f"loss_block_stats{form}", loss._stats, stats, constexprs, num_warps=loss.STATS_WARPS)
        (rows, columns), warps = (FILTER_TILE, loss.FILTER_WARPS) if is_on else (loss.PLAIN_TILE, loss.PLAIN_WARPS)
        constexprs = {**flags, "HAS_SMOOTH": is_on, "FILTER": is_on, "ROWS": rows, "COLUMNS": columns}
        found += for_dtypes(f"loss_block_gradient{form}", loss._gradient, gradient, constexprs, num_warps=warps)
    return found


def norm_builds() -> list[Build]:
    """Short rows, rows of one tile and rows wider than it."""
    rows = {"num_rows": "i64"}
    inputs = {"x_ptr": "*T", "residual_ptr": "*T", "weight_ptr": "*T", "sum_ptr": "*T", "out_ptr": "*T"}
    forward = {**inputs, "rstd_ptr": "*fp32", **rows, "eps": "fp32"}
    grads = {"d_out_ptr": "*T", "d_sum_ptr": "*T", "x_ptr": "*T", "weight_ptr": "*T", "rstd_ptr": "*fp32"}
    backward = {**grads, "d_x_ptr": "*T", "partial_ptr": "*fp32", **rows, "rows_per_program": "i64"}
    found: list[Build] = []
    # fp32 takes the most registers where a thread holds the most of a row.
    for width, gemma, has_residual, dtypes in (
        (128, False, False, ("bf16",)),
        (2304, True, True, ("bf16", "fp16")),
        (8192, False, True, ("fp32",)),
        (16384, False, True, ("fp32",)),
    ):
        tile_rows, block, num_warps = norm.tile_shape(width)
        shape = {"WIDTH": width, "BLOCK": block, "GEMMA": gemma}
        kernel, last = norm.rms_norm_backward_wide, {**shape, "HAS_D_SUM": has_residual}
        if width <= block:
            kernel, last = norm.rms_norm_backward, {**last, "ROWS": tile_rows}
        first = {**shape, "ROWS": tile_rows, "HAS_RESIDUAL": has_residual}
        for used, signature, constexprs in ((norm.rms_norm_forward, forward, first), (kernel, backward, last)):
            name = f"{used.__name__}[{width}]"
            found += for_dtypes(name, used, signature, constexprs, dtypes=dtypes, num_warps=num_warps)
    return found


def pages_builds() -> list[Build]:
    """The kernels at head dimension 128; T is the dtype of k (of the page means where they are stored in it)."""
    strides = {f"mean_{name}": "i64" for name in ("batch", "page", "head")}
    sizes = {"num_queries": "i32", "num_pages": "i32", "num_kv_heads": "i32", "width": "i32", **strides}
    blocks = {"QUERIES": pages.QUERIES, "PAGES": pages.PAGES, "WIDTH": pages.SLICE, "SLICES": 128 // pages.SLICE}
    k_strides = {f"k_{name}": "i64" for name in ("batch", "token", "head")}
    mean = {
        "k": "*T",
        "means": "*fp32",
        "num_tokens": "i32",
        "page_size": "i32",
        "width": "i32",
        **k_strides,
        **strides,
    }
    mean_blocks = {"STEPS": 128 // pages.MEAN_TOKENS, "TOKENS": pages.MEAN_TOKENS, "WIDTH": 128}
    scoring = {"summed": "*fp32", "means": "*T", "largest": "*fp32", "sum_exp": "*fp32", **sizes}
    score = {**scoring, "scores": "*fp32", "tile": "i32"}
    return [
        *for_dtypes("page_mean", pages._page_mean, mean, mean_blocks, num_warps=pages.NUM_WARPS),
        *for_dtypes("page_softmax", pages._page_softmax, scoring, blocks, num_warps=pages.NUM_WARPS),
        *for_dtypes(
            "page_score", pages._page_score, score, {**blocks, "STEPS": 128 // pages.QUERIES}, num_warps=pages.NUM_WARPS
        ),
    ]


def qk_norm_builds() -> list[Build]:
    """Heads of Qwen3 and of Gemma 3."""
    ends = ("q_ptr", "k_ptr", "q_weight_ptr", "k_weight_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
    forward = {**dict.fromkeys(ends, "*T"), "q_rstd_ptr": "*fp32", "k_rstd_ptr": "*fp32", "eps": "fp32"}
    forward |= ROPE_STRIDES
    backward = dict.fromkeys(("d_out_ptr", "x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "d_x_ptr"), "*T")
    backward |= {"rstd_ptr": "*fp32", "partial_ptr": "*fp32", "places_per_program": "i64"}
    backward |= {
        name: "i64" for name in qk_norm.qk_norm_rope_backward.arg_names if "num_" in name or "_stride_" in name
    }
    found: list[Build] = []
    for q_heads, k_heads, head_size, gemma, dtypes in (
        (32, 8, 128, False, ("bf16", "fp32")),
        (4, 1, 256, True, ("fp16",)),
    ):
        q, k = (torch.empty(1, 1, heads, head_size, device="meta") for heads in (q_heads, k_heads))
        shape = rope.heads_shape(q, k)
        one = {"HEADS": q_heads, "TILE_HEADS": shape["Q_TILE"], "HALF": shape["HALF"], "BLOCK": shape["BLOCK"]}
        for kernel, signature, constexprs, num_warps in (
            (qk_norm.qk_norm_rope_forward, forward, {**shape, "GEMMA": gemma}, 4),
            (qk_norm.qk_norm_rope_backward, backward, {**one, "GEMMA": gemma}, 8),
        ):
            name = f"{kernel.__name__}[{q_heads},{k_heads},{head_size}]"
            found += for_dtypes(name, kernel, signature, constexprs, dtypes=dtypes, num_warps=num_warps)
    return found


def rope_builds() -> list[Build]:
    """Heads of Llama 3 and, backward, of Gemma 3."""
    pointers = ("q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "q_out_ptr", "k_out_ptr")
    signature = {**dict.fromkeys(pointers, "*T"), **ROPE_STRIDES}
    found: list[Build] = []
    for q_heads, k_heads, head_size, backward, dtypes in (
        (32, 8, 128, False, ("bf16", "fp32")),
        (4, 1, 256, True, ("fp16",)),
    ):
        q, k = (torch.empty(1, 1, heads, head_size, device="meta") for heads in (q_heads, k_heads))
        constexprs = {**rope.heads_shape(q, k), "BACKWARD": backward}
        name = f"rope_rotate[{q_heads},{k_heads},{head_size}]"
        found += for_dtypes(name, rope.rope_rotate, signature, constexprs, dtypes=dtypes)
    return found


def main(argv: list[str] | None = None) -> int:
    """Compile all; rows go to stdout, complaints to stderr. Returns 1 where there is a complaint, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one dtype per architecture")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    complaints = []
    for row in compile_all(all_builds(), options.processes, quick=options.quick):
        sys.stdout.write(json.dumps(asdict(row)) + "\n")
        sys.stdout.flush()
        complaints += [text] if (text := complaint(row)) else []
    sys.stderr.writelines(f"{text}\n" for text in complaints)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())
