"""The table of attention operators: what each can do on this GPU, how right it is, and how fast.

Operators: `flash` (aten), `cudnn` (aten), `fa4` (flash-attn-4, where it is installed). Shapes are those of the models
we train: 28 query heads over 4 key heads (Qwen2.5-7B) and 32 over 8 (Llama-3-8B, Mistral, Qwen3-8B), head size 128,
bf16.

FLOPs of one forward: 4 * Tq * Tk * Hq * D, half of it where the mask is causal and Tq = Tk; backward is 2.5 forwards
(five products for two). Rates are TFLOP/s by that count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from headrace.bench.harness import OptionValue
from headrace.bench.harness import Row as BenchRow
from headrace.platform.doctor.rates import Row, cuda_seconds

HEAD_SIZE = 128
HEADS = ((28, 4), (32, 8))
LENGTHS = (16384, 65536, 262144)
PREFIX = 262144
BLOCKS = (16384, 65536)
aten = torch.ops.aten
DESCRIPTION = "attention operators on a GPU: what they support, their error and their speed"
OPTIONS: Mapping[str, OptionValue] = {"limit_s": 85}


def run(options: Mapping[str, OptionValue]) -> Iterator[BenchRow]:
    """One row for each fact and rate; `limit_s` seconds after the start no further shape is started."""
    for row in attention_rows(time.monotonic() + float(options["limit_s"])):
        numbers = {key: row[key] for key in row if key in ("s", "tflops", "first_call_s") or key.endswith("_rel_error")}
        config = {key: row[key] for key in row.keys() - numbers.keys() - {"what", "error"}}
        name = " ".join(str(row[key]) for key in ("what", "operator") if key in row)
        yield BenchRow(name, numbers, config, error=row.get("error"))


@dataclass(frozen=True)
class Operator:
    """One attention operator, called as it is.

    Args:
        forward: (q, k, v, causal) -> (out, lse, whatever backward needs), tensors (B, H, T, D).
        backward: (dout, (q, k, v), out, lse, rest, causal) -> (dq, dk, dv).
        has_deterministic: whether torch.use_deterministic_algorithms changes its backward.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, Any]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    has_deterministic: bool


def _flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[Any, Any, Any]:
    out, lse, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, lse, rest


def _flash_backward(
    dout: torch.Tensor, qkv: tuple[torch.Tensor, ...], out: torch.Tensor, lse: torch.Tensor, rest: Any, causal: bool
) -> Any:
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
    return aten._scaled_dot_product_flash_attention_backward(
        dout, *qkv, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
    )


def _cudnn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[Any, Any, Any]:
    out, lse, *rest = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    return out, lse, rest


def _cudnn_backward(
    dout: torch.Tensor, qkv: tuple[torch.Tensor, ...], out: torch.Tensor, lse: torch.Tensor, rest: Any, causal: bool
) -> Any:
    cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, *qkv, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal
    )


def _fa4() -> Operator:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[Any, Any, Any]:
        out, lse, *_ = _flash_attn_fwd(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal, return_lse=True)
        return out.transpose(1, 2), lse, None

    def backward(
        dout: torch.Tensor, qkv: tuple[torch.Tensor, ...], out: torch.Tensor, lse: torch.Tensor, rest: Any, causal: bool
    ) -> Any:
        q, k, v = (t.transpose(1, 2) for t in qkv)
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = _flash_attn_bwd(
            q, k, v, out.transpose(1, 2), dout.transpose(1, 2), lse, causal=causal, deterministic=deterministic
        )
        return tuple(g.transpose(1, 2) for g in grads[:3])

    return Operator("fa4", forward, backward, has_deterministic=True)


def operators() -> tuple[list[Operator], list[Row]]:
    """Every operator that can be reached here, and a row for each that cannot, with the reason."""
    found = [
        Operator("flash", _flash_forward, _flash_backward, has_deterministic=True),
        Operator("cudnn", _cudnn_forward, _cudnn_backward, has_deterministic=False),
    ]
    try:
        found.append(_fa4())
    except Exception as error:  # optional extra: absent, or its compiler does not know this GPU
        return found, [{"what": "attention", "operator": "fa4", "error": f"{type(error).__name__}: {error}"}]
    return found, []


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _tensors(heads: tuple[int, int], num_q: int, num_k: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """(dout, (q, k, v)) of shapes (1, H, T, D), laid out in memory as (1, T, H, D) as a model leaves them."""

    def make(num_heads: int, num_tokens: int) -> torch.Tensor:
        shape = (1, num_tokens, num_heads, HEAD_SIZE)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    return make(heads[0], num_q), (make(heads[0], num_q), make(heads[1], num_k), make(heads[1], num_k))


def speed_rows(operator: Operator, heads: tuple[int, int], num_q: int, num_k: int, causal: bool) -> Iterator[Row]:
    """Forward, backward, and backward under the deterministic switch, of one shape; a refusal becomes a row too."""
    base: Row = {"what": "attention", "operator": operator.name, "q_heads": heads[0], "kv_heads": heads[1]}
    base |= {"num_q": num_q, "num_k": num_k, "causal": causal}
    forward_flops = 4.0 * num_q * num_k * heads[0] * HEAD_SIZE * (0.5 if causal and num_q == num_k else 1.0)
    try:
        dout, qkv = _tensors(heads, num_q, num_k)
        start = time.perf_counter()
        out, lse, rest = operator.forward(*qkv, causal)
        operator.backward(dout, qkv, out, lse, rest, causal)
        torch.cuda.synchronize()
        first_call_s = time.perf_counter() - start
        seconds = cuda_seconds(lambda: operator.forward(*qkv, causal))
        yield base | {"pass": "forward", "s": seconds, "tflops": forward_flops / seconds / 1e12}
        for deterministic in (False, True) if operator.has_deterministic else (False,):
            with _deterministic(deterministic):
                seconds = cuda_seconds(lambda: operator.backward(dout, qkv, out, lse, rest, causal))
            row = base | {"pass": "backward", "deterministic": deterministic, "first_call_s": first_call_s}
            yield row | {"s": seconds, "tflops": 2.5 * forward_flops / seconds / 1e12}
    except Exception as error:  # one operator that refuses one shape must not cost the rest of the table
        yield base | {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        torch.cuda.empty_cache()


def dense(qkv: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in fp64: (out (1, H, Tq, D), LSE (1, H, Tq)); mask is True where a key is seen."""
    q, k, v = (t.double() for t in qkv)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / HEAD_SIZE**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def facts_rows(operator: Operator) -> list[Row]:
    """Facts for a caller: causal alignment where q is shorter than k, LSE layout, error, run-to-run bits."""
    row: Row = {"what": "attention_facts", "operator": operator.name}
    num_q, num_k = 512, 1024
    try:
        dout, qkv = _tensors((8, 2), num_q, num_k)
        out, lse, rest = operator.forward(*qkv, True)
        ones = torch.ones(num_q, num_k, dtype=torch.bool, device="cuda")
        masks = {"top_left": ones.tril(), "bottom_right": ones.tril(num_k - num_q)}
        errors = {name: _relative(out, dense(qkv, mask)[0]) for name, mask in masks.items()}
        row["causal_alignment"] = min(errors, key=lambda name: errors[name])
        row["out_rel_error"] = min(errors.values())
        row["lse_shape"], row["lse_dtype"] = list(lse.shape), str(lse.dtype)[6:]
        expected = dense(qkv, masks[row["causal_alignment"]])[1]
        row["lse_rel_error"] = (
            _relative(lse.reshape(expected.shape), expected) if lse.numel() == expected.numel() else None
        )
        for deterministic in (False, True):
            with _deterministic(deterministic):
                runs = [operator.backward(dout, qkv, out, lse, rest, True) for _ in range(4)]
            equal = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
            row[f"backward_bits_repeat_deterministic_{deterministic}".lower()] = equal
        row["gradient_dtype"] = str(runs[0][0].dtype)[6:]
    except Exception as error:  # see speed_rows
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return [row]


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def attention_rows(deadline_s: float) -> Iterator[Row]:
    """The whole table, most wanted rows first; what time does not allow is listed in one closing row.

    Args:
        deadline_s: time.monotonic() value after which no further shape is started.
    """
    found, missing = operators()
    yield from missing
    for operator in found:
        yield from facts_rows(operator)
    shapes = [(heads, n, n, True) for n in LENGTHS for heads in HEADS]
    shapes += [(heads, block, PREFIX, False) for block in BLOCKS for heads in HEADS]
    skipped = []
    for heads, num_q, num_k, causal in sorted(shapes, key=lambda s: s[1] * s[2]):
        for operator in found:
            if time.monotonic() > deadline_s:
                skipped.append(f"{operator.name} {heads[0]}/{heads[1]} {num_q}x{num_k}")
                continue
            yield from speed_rows(operator, heads, num_q, num_k, causal)
    if skipped:
        yield {"what": "attention_skipped", "reason": "time", "shapes": skipped}
