"""A program: our operators on CUDA tensors that hold no bytes, on a machine without a GPU or a CUDA build of torch.

    python on_fake_cuda.py

prints one JSON object a line: what two blocks of the 7B decoder with its loss, a block under the sweep, both loss axes
and attention return; the cases of `bench kernels device=cuda` that it ran; and what the compiler says of every Triton
kernel that they launched. Numbers are not checked here; shapes, dtypes, devices and the arguments of kernels are. A
graph cannot be recorded for a device that this build of torch does not know, so the backward of an autograd function is
called once its forward has returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from headrace.bench import kernel_block, kernel_codec, kernel_loss
from headrace.bench.kernel_case import Case
from headrace.bench.kernel_settings import Settings
from headrace.bench.model_shapes import model_shape
from headrace.helpers.builds import Build, compile_all, complaint
from headrace.kernels import api
from headrace.kernels.loss import function as loss_function
from headrace.kernels.loss import prepare as loss_prepare
from headrace.workers.memory.layer_sweep import PlannedBlock
from headrace.workers.memory.plan import Cuts, LayerPlan, Residence, keep_layer
from headrace.workers.memory.schedule import Schedule
from headrace.workers.memory.shelf import Shelf
from headrace.workers.model.decoder import Decoder
from headrace.workers.model.program import Shared

CUDA = torch.device("cuda", 0)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Context(SimpleNamespace):
    """What an autograd function keeps between its two calls."""

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, wanted: bool) -> None:
        pass

    mark_non_differentiable = mark_dirty = set_materialize_grads


def apply_both_ways(function: Any, *args: Any) -> Any:
    """Stands in for Function.apply: forward, then backward with cotangents like the outputs."""
    ctx = Context(needs_input_grad=tuple(isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args))
    outputs = function.forward(ctx, *args)
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [None if out is None else torch.empty_like(out) for out in results]
    grads = function.backward(ctx, *cotangents)
    for arg, grad in zip(args, grads if isinstance(grads, tuple) else (grads,), strict=True):
        if isinstance(grad, torch.Tensor):
            assert (grad.shape, grad.dtype, grad.device) == (arg.shape, arg.dtype, arg.device), function
    return outputs


class WithoutLibrary(TorchFunctionMode):
    """Calls that ask for the CUDA library before anything else, such as tensor[...], by other operators of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return view_of(*args)
        if func is torch.Tensor.__setitem__:
            tensor, index, value = args
            return written(view_of(tensor, index), value)
        if func is torch.Tensor.copy_:
            return written(*args[:2])
        if func is torch.Tensor.contiguous and not args[0].is_contiguous():
            return torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
        if func is torch.Tensor.__invert__:
            return torch.logical_not(*args)
        if "out_dtype" in (kwargs or {}):  # torch knows not even its shape without CUDA
            *_, a, b = args
            product = torch.mm(a, b).to(kwargs["out_dtype"])
            return written(kwargs.get("out", product), product)
        return func(*args, **(kwargs or {}))


class AttentionCalls(TorchDispatchMode):
    """The attention operators of torch that were called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def written(target: torch.Tensor, value: Any) -> torch.Tensor:
    """The target of a copy that fits into it."""
    shape = value.shape if isinstance(value, torch.Tensor) else ()
    assert torch.broadcast_shapes(shape, target.shape) == target.shape
    return target


def view_of(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """tensor[index]; a copy with index tensors, which stand side by side."""
    words = list(index) if isinstance(index, tuple) else [index]
    taken = sum(word is not None and word is not Ellipsis for word in words)
    if any(word is Ellipsis for word in words):
        place = next(n for n, word in enumerate(words) if word is Ellipsis)
        words[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    dim = 0
    if tensors := [word for word in words if isinstance(word, torch.Tensor)]:
        place = next(n for n, word in enumerate(words) if word is tensors[0])
        assert words[:place] == [slice(None)] * place
        tensor = torch.ops.aten.index.Tensor(tensor, [None] * place + tensors)
        words[place : place + len(tensors)] = [slice(None)]
    for word in words:
        if isinstance(word, int):
            tensor = tensor.select(dim, word)
            continue
        if word is None:
            tensor = tensor.unsqueeze(dim)
        else:
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, word.start, word.stop, word.step or 1)
        dim += 1
    return tensor


@contextmanager
def fake_cuda() -> Iterator[dict[str, Any]]:
    """CUDA tensors without bytes, on a card that says it is Hopper; yields what Triton kernels are launched with."""
    launched: dict[str, Any] = {}
    with ExitStack() as patches:
        for target, name, value in (
            (JITFunction, "run", recorder(launched)),
            (torch.autograd.Function, "apply", classmethod(apply_both_ways)),
            (loss_function, "_wants_gradient", lambda *tensors: True),
            (loss_prepare, "check_labels", lambda targets, *rest: targets.numel()),
            (torch.cuda, "device_of", lambda tensor: nullcontext()),
            (torch.cuda, "get_device_capability", lambda *device: (9, 0)),
            (torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0)),
            (torch.cuda, "get_device_properties", lambda *device: SimpleNamespace(multi_processor_count=132)),
        ):
            patches.enter_context(patch.object(target, name, value))
        patches.enter_context(torch.no_grad())
        patches.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        patches.enter_context(WithoutLibrary())
        yield launched


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def said(value: Any) -> Any:
    """Shape, dtype and device of a tensor, or of several."""
    if isinstance(value, torch.Tensor):
        return [list(value.shape), str(value.dtype).removeprefix("torch."), str(value.device)]
    return [said(one) for one in value]


def shapes() -> None:
    """Two blocks of Qwen2.5-7B at 32K with its loss, both axes of the loss alone, attention whole and by blocks."""
    model = replace(model_shape("qwen2_5_7b"), num_layers=2)  # the others are the same again
    tokens, targets = (torch.empty(1, 32768, dtype=torch.int64, device=CUDA) for _ in range(2))
    for kernels in (api.Backend.reference, api.Backend.triton):
        operators = api.Operators(attention=api.AttentionOperator.auto, kernels=kernels)
        decoder = Decoder(model, dtype=torch.bfloat16, device="meta", operators=operators)
        for module in decoder.modules():
            for name, param in [*module.named_parameters(recurse=False)]:
                module._parameters[name] = torch.nn.Parameter(on_cuda(*param.shape), requires_grad=False)
        # Few tiles: each is the same again.
        say(case=f"decoder {kernels.value}", out=said(decoder(tokens, targets, loss_tile=16384)))
    hidden, weight = on_cuda(4096, 3584), on_cuda(152064, 3584)
    labels = torch.empty(4096, dtype=torch.int64, device=CUDA)
    for axis in (api.ChunkAxis.tokens, api.ChunkAxis.vocabulary):
        for backend in (api.Backend.reference, api.Backend.triton):
            out = api.linear_cross_entropy(
                hidden, weight, labels, reduction="sum", options=api.LossOptions(axis=axis), backend=backend
            )
            say(case=f"loss {axis.value} {backend.value}", out=said(out))
    q, k = on_cuda(1, 32768, 28, 128), on_cuda(1, 32768, 4, 128)
    packing = api.Packing.of_lengths((1000, 1, 31767), CUDA)
    for name, masks in {
        "whole": {},
        "by blocks": {"block_len": 8192},
        "packed": {"packing": packing},
    }.items():
        for operator in (api.AttentionOperator.auto, api.AttentionOperator.flash):
            with AttentionCalls() as calls:
                out = api.attention(q, k, k, scale=0.125, operator=operator, **masks)
            say(case=f"attention {name} {operator.value}", out=said(out), calls=calls.names)

    q, k = on_cuda(1, 4096, 28, 128), on_cuda(1, 4096, 4, 128)
    out = api.attention(q, k, k, scale=0.125, operator=api.AttentionOperator.flash, block_len=2048, window=2500)
    say(case="attention window by blocks flash", out=said(out))


def sweep() -> None:
    """A block of Qwen2.5-7B at 32K under the sweep by layer, both ways: everything held, and the input alone."""
    model = model_shape("qwen2_5_7b")
    block = Decoder(replace(model, num_layers=1), dtype=torch.bfloat16, device="meta").blocks[0]
    for module in block.modules():
        for name, param in [*module.named_parameters(recurse=False)]:
            module._parameters[name] = torch.nn.Parameter(on_cuda(*param.shape), requires_grad=False)
    schedule = Schedule(block.program.skeleton)
    shared = Shared((on_cuda(1, 32768, 128), on_cuda(1, 32768, 128)))
    for name, plan in {"keep": keep_layer(schedule.skeleton), "recompute": LayerPlan.of(x=Residence.hbm)}.items():
        shelf = Shelf(None, 1, None)
        shelf.begin(0, 0)
        planned = PlannedBlock(
            block=block,
            layer=0,
            program=block.program,
            schedule=schedule,
            plan=plan,
            cuts=Cuts(8192),
            shelf=shelf,
        )
        say(case=f"sweep {name}", out=said(planned.run(on_cuda(1, 32768, model.hidden_size), shared)))


def launches() -> None:
    """One pass, both ways, of the benchmark's cases that our Triton kernels compute."""
    settings = Settings(("loss", "block", "codec"), CUDA, "bfloat16", None, None, 1, 1.0, 1.0)
    for module, run in ((kernel_block, run_block), (kernel_codec, run_codec), (kernel_loss, run_loss)):
        with patch.object(module, "generator", lambda device, seed: None):
            for case in module.cases(settings):
                if case.family == "ours" and "triton" in (case.contender, case.options.get("backend")):
                    run(case)
                    say(ran=case.name)


def run_block(case: Case) -> None:
    block = kernel_block.OPERATORS[case.operator]
    leaves, constants = block.draw(case)
    block.call(*leaves, *constants, backend=api.Backend.triton)


def run_codec(case: Case) -> None:
    codec, width = api.CodecName(case.operator), case.shape["width"]
    held = api.encode_rows(codec, on_cuda(case.shape["tokens"], width), seed=1, stream=0, backend=api.Backend.triton)
    api.decode_rows(codec, held, width, torch.bfloat16, backend=api.Backend.triton)


def run_loss(case: Case) -> None:
    tokens, vocab, width = (case.shape[key] for key in ("tokens", "vocab", "width"))
    call, _ = kernel_loss._call_of(case)
    call(on_cuda(tokens, width), on_cuda(vocab, width), on_cuda(tokens, dtype=torch.int64))


def main() -> None:
    """Everything under fake CUDA; then every kernel that was launched is compiled, once per specialisation."""
    with fake_cuda() as launched:
        shapes()
        sweep()
        launches()
    for row in compile_all(list(launched.values()), 2, (90,)):
        say(**asdict(row), complaint=complaint(row))


def recorder(launched: dict[str, Any]) -> Callable[..., None]:
    """Stands in for JITFunction.run: adds what a launch would compile, once per specialisation."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        options = {name: more.pop(name) for name in ("num_warps", "num_stages") if name in more}
        bound = self.signature.bind(*args, **more)
        bound.apply_defaults()
        signature, constexprs, odd = {}, {}, []
        for param in self.params:
            value = bound.arguments[param.name]
            is_one = type(value) is int and value == 1 and not param.do_not_specialize
            if param.is_constexpr or value is None or is_one:
                constexprs[param.name] = value
                continue
            signature[param.name], is_even = argument_type(value)
            if param.do_not_specialize or not is_even:
                odd.append(param.name)
        key = repr((self.__name__, signature, constexprs, odd, options))
        name = f"{self.__name__}[{len(launched)}]"
        launched.setdefault(key, Build(name, self, signature, constexprs, unaligned=odd, **options))

    return run


def argument_type(value: Any) -> tuple[str, bool]:
    """Triton's type of an argument, and whether 16 divides it (a tensor begins where torch's allocator puts it)."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "i1", True
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", True


if __name__ == "__main__":
    main()
