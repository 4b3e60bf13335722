"""The pointwise and row-wise operators of a block: plain, compiled, fused, Liger, and a copy of as many bytes.

A rate counts the bytes that have to be read and written once, whatever a contender really moves: forward the inputs and
the results, backward the saved inputs, the cotangents and the gradients.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headrace.bench.kernel_case import OURS, TORCH, Case, NotHere, Shared, Task, generator, oracle_dtype
from headrace.bench.kernel_settings import Settings
from headrace.kernels import api

# Llama-3-8B on CUDA; heads are query + key heads.
CUDA_SIZES = {"tokens": 16384, "hidden": 4096, "q_heads": 32, "k_heads": 8, "head": 128, "inner": 14336}
CPU_SIZES = {"tokens": 1024, "hidden": 512, "q_heads": 8, "k_heads": 2, "head": 64, "inner": 1024}
EPS = 1e-5
Tensors = tuple[torch.Tensor, ...]
Operator = Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """An operator of a block.

    Args:
        sizes: its dimensions, names of CUDA_SIZES.
        draw: case -> inputs that have gradients, and constants after them.
        forward_tensors / backward_tensors: how many tensors like the first input are read and written at least.
    """

    sizes: tuple[str, ...]
    draw: Callable[[Case], tuple[Tensors, Tensors]]
    call: Operator
    forward_tensors: float
    backward_tensors: float


def _draws(case: Case, *shapes: Sequence[int]) -> Tensors:
    draws = generator(case.torch_device, 0)
    made = (torch.randn(tuple(shape), device=case.torch_device, generator=draws) for shape in shapes)
    return tuple(tensor.to(case.torch_dtype).requires_grad_() for tensor in made)


def _norm_inputs(num_rows: int) -> Callable[[Case], tuple[Tensors, Tensors]]:
    def draw(case: Case) -> tuple[Tensors, Tensors]:
        rows, width = case.shape["tokens"], case.shape["hidden"]
        return _draws(case, *[(rows, width)] * num_rows, (width,)), ()

    return draw


def _rope_inputs(case: Case) -> tuple[Tensors, Tensors]:
    size = case.shape
    qk = _draws(case, *((1, size["tokens"], size[heads], size["head"]) for heads in ("q_heads", "k_heads")))
    frequencies = api.rope_frequencies(size["head"], 500_000.0).to(case.torch_device)
    positions = torch.arange(size["tokens"], device=case.torch_device)[None]
    return qk, api.rope_tables(positions, frequencies, case.torch_dtype)


def _qk_norm_inputs(case: Case) -> tuple[Tensors, Tensors]:
    heads, tables = _rope_inputs(case)
    return heads + _draws(case, *[(case.shape["head"],)] * 2), tables


def _gate_inputs(case: Case) -> tuple[Tensors, Tensors]:
    return _draws(case, *[(case.shape["tokens"], case.shape["inner"])] * 2), ()


# apply_rope: q and k are 1.25 times q at 32 and 8 heads, read and written once each; backward of norms reads them too.
OPERATORS: dict[str, Block] = {
    "rms_norm": Block(
        ("tokens", "hidden"), _norm_inputs(1), lambda x, w, **more: api.rms_norm(x, w, EPS, **more), 2, 3
    ),
    "add_rms_norm": Block(
        ("tokens", "hidden"), _norm_inputs(2), lambda x, r, w, **more: api.add_rms_norm(x, r, w, EPS, **more), 4, 4
    ),
    "apply_rope": Block(("tokens", "q_heads", "k_heads", "head"), _rope_inputs, api.apply_rope, 2.5, 2.5),
    "qk_norm_rope": Block(
        ("tokens", "q_heads", "k_heads", "head"),
        _qk_norm_inputs,
        lambda q, k, q_weight, k_weight, cos, sin, **more: api.qk_norm_rope(
            q, k, q_weight, k_weight, cos, sin, EPS, **more
        ),
        2.5,
        3.75,
    ),
    "swiglu": Block(("tokens", "inner"), _gate_inputs, api.swiglu, 3, 5),
    "geglu": Block(("tokens", "inner"), _gate_inputs, api.geglu, 3, 5),
}


NOT_IN_LIGER = ("qk_norm_rope",)


def cases(settings: Settings) -> list[Case]:
    """Every contender of every operator."""
    sizes = CUDA_SIZES if settings.on_cuda else CPU_SIZES
    contenders = [("copy", TORCH), ("reference", TORCH)]
    if settings.on_cuda:
        contenders += [("triton", OURS), ("torch_compile", TORCH), ("liger", "liger")]
    found = []
    for operator, block in OPERATORS.items():
        shape = {name: sizes[name] for name in block.sizes}
        word = f"{operator}/{'x'.join(str(size) for size in shape.values())}"
        found += [
            Case("block", word, name, family, shape, str(settings.device), settings.dtype, operator)
            for name, family in contenders
            if name != "liger" or operator not in NOT_IN_LIGER
        ]
    return found


def build(case: Case, shared: Shared) -> Task:
    """The case's tensors and passes.

    Raises:
        NotHere: the contender's package is missing.
    """
    block = OPERATORS[case.operator]
    leaves, constants = shared.get("inputs", partial(block.draw, case))
    num_bytes = leaves[0].numel() * leaves[0].element_size()
    forward_bytes, backward_bytes = (round(n * num_bytes) for n in (block.forward_tensors, block.backward_tensors))
    if case.contender == "copy":
        source, copy = (torch.ones(forward_bytes // 2, dtype=torch.uint8, device=case.torch_device) for _ in range(2))
        return Task(lambda: copy.copy_(source), None, (), lambda result: {}, forward_bytes=forward_bytes)
    call, facts = _call_of(case, block)
    oracle = shared.get("oracle", partial(_oracle, block, leaves, constants))
    cotangents = shared.get("cotangents", partial(_cotangents, block, leaves, constants))
    return Task(
        forward=lambda: _as_tuple(call(*leaves, *constants)),
        backward=lambda outs: _backward(outs, leaves, cotangents),
        leaves=leaves,
        check=lambda outs: {"rel_error": _worst([*outs, *(leaf.grad for leaf in leaves)], oracle)},
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        facts=facts,
    )


def _as_tuple(outs: Any) -> Tensors:
    return outs if isinstance(outs, tuple) else (outs,)


def _backward(outs: Tensors, leaves: Tensors, cotangents: Tensors) -> None:
    for leaf, grad in zip(leaves, torch.autograd.grad(outs, leaves, cotangents), strict=True):
        leaf.grad = grad


def _cotangents(block: Block, leaves: Tensors, constants: Tensors) -> Tensors:
    draws = generator(leaves[0].device, 1)
    with torch.no_grad():
        outs = _as_tuple(block.call(*leaves, *constants, backend=api.Backend.reference))
    return tuple(torch.randn(out.shape, device=out.device, generator=draws).to(out.dtype) for out in outs)


def _oracle(block: Block, leaves: Tensors, constants: Tensors) -> list[torch.Tensor]:
    """Results and gradients of the plain form in a wide dtype, from the same rounded inputs."""
    wide = oracle_dtype(leaves[0].device)
    copies = tuple(leaf.detach().to(wide).requires_grad_() for leaf in leaves)
    tables = [constant.to(wide) for constant in constants]
    outs = _as_tuple(block.call(*copies, *tables, backend=api.Backend.reference))
    cotangents = tuple(tensor.to(wide) for tensor in _cotangents(block, leaves, constants))
    return [tensor.detach() for tensor in (*outs, *torch.autograd.grad(outs, copies, cotangents))]


def _worst(got: Sequence[torch.Tensor], oracle: Sequence[torch.Tensor]) -> float:
    """The largest relative error of any result or gradient."""
    errors = []
    for one, exact in zip(got, oracle, strict=True):
        errors.append(float((one.detach().double() - exact.double()).norm() / exact.double().norm()))
    return max(errors)


def _call_of(case: Case, block: Block) -> tuple[Operator, Mapping[str, Any]]:
    if case.contender in ("reference", "torch_compile"):
        plain = partial(block.call, backend=api.Backend.reference)
        return (torch.compile(plain) if case.contender == "torch_compile" else plain), {}
    if case.family == OURS:
        return partial(block.call, backend=api.Backend.triton), {}
    try:
        call = _liger(case.operator)
    except ImportError as error:
        raise NotHere(f"{case.contender} is not installed here: {error}") from error
    return call, {"package": "liger-kernel", "package_version": importlib.metadata.version("liger-kernel")}


def _liger(operator: str) -> Operator:
    """Its Triton functions as its own modules call them; several write over their inputs."""
    from liger_kernel import ops

    def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
        rotated = ops.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return tuple(tensor.transpose(1, 2) for tensor in rotated)

    return {
        "rms_norm": lambda x, w: ops.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", True),
        "add_rms_norm": lambda x, r, w: ops.LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False),
        "apply_rope": rope,
        "swiglu": ops.LigerSiLUMulFunction.apply,
        "geglu": ops.LigerGELUMulFunction.apply,
    }[operator]
