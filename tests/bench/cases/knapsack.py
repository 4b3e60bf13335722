"""FLOPs that backward computes again: our plans beside those of torch's own planner, at equal peak of live tensors.

torch.compile with `activation_memory_budget` chooses what a block keeps by a knapsack over its graph. Each block of
transformers' decoder is compiled by itself, with the graphs run by eager operators, so that every tensor is seen. Ours
is the plan that auto solves for the device alone, with as many bytes as theirs took, less the gradients of one block's
parameters: theirs hold those beside the parameters' own, ours add them up in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from headrace.bench.harness import OptionValue, Row, Target
from headrace.bench.model_shapes import model_shape
from headrace.bench.plan_check import measure, ready_decoder, tokens_of, with_budgets
from headrace.bench.step import MIB, hugging_face
from headrace.helpers.live_bytes import LiveBytes
from headrace.platform.planning import priced
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.request import PlanRequest
from headrace.platform.planning.solve import find_plan
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.model.decoder import Decoder

DESCRIPTION = "FLOPs computed again in backward, beside torch's activation_memory_budget at equal peak"
OPTIONS: Mapping[str, OptionValue] = {
    "model": "llama_5m",
    # Small, so that the loss, which theirs do not have, takes few bytes of ours.
    "vocab_size": 64,
    "seq_len": 2048,
    "budgets": "0.9,0.75,0.6,0.45,0.3,0.15",
}
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def run(options: Mapping[str, OptionValue]) -> Iterator[Row]:
    """One row per budget of torch's planner.

    Raises:
        InputError: an unknown shape, or a budget that is no share.
    """
    try:
        budgets = [float(word) for word in str(options["budgets"]).split(",")]
    except ValueError:
        budgets = [-1.0]
    if not all(0 <= budget < 1 for budget in budgets):
        raise InputError(f"budgets={options['budgets']}: shares from 0 to below 1, with commas")
    model = model_shape(str(options["model"]))
    model = replace(model, vocab_size=int(options["vocab_size"]), tie_embeddings=True)
    decoder, tokens = ready_decoder(model), tokens_of(model, int(options["seq_len"]))
    _count_attention()
    base, _ = theirs(decoder, tokens, 1.0)
    of_block = sum(param.nbytes for param in decoder.blocks[0].parameters())
    cpu = HardwareProfile(name="cpu", device_class=DeviceClass.cpu)
    for budget in budgets:
        flops, peak = theirs(decoder, tokens, budget)
        again = flops - base
        request = PlanRequest(model=model, seq_len=tokens.shape[1], profile=cpu)
        request = with_budgets(request, {Medium.hbm: peak - of_block, Medium.host: 0, Medium.ssd: 0})
        plan = find_plan(replace(request, head_groups=1, sweep=None))
        numbers = {"their_recomputed_gflops": again / 1e9, "their_live_peak_mib": peak / MIB}
        if plan is None:
            yield Row(f"budget {budget:g}", numbers, dict(options), error="no plan of ours fits")
            continue
        ours = priced.work_of(plan, request).rerun_flops
        found = measure(plan, decoder, tokens).peaks[Medium.hbm]
        numbers |= {"our_recomputed_gflops": ours / 1e9, "our_live_peak_mib": found / MIB}
        target = Target("no more FLOPs at no higher peak", ours <= again and found <= peak)
        yield Row(f"budget {budget:g}", numbers, {**options, "plan": plan.solver, "sweep": plan.sweep.value}, target)


def theirs(decoder: Decoder, tokens: torch.Tensor, budget: float) -> tuple[int, int]:
    """FLOPs of backward, and most bytes of live tensors, of the compiled blocks; parameters and gradients apart."""
    torch._dynamo.reset()
    net = hugging_face(decoder.config, decoder).model
    flops = {"forward": 0, "backward": 0}
    live: LiveBytes | None = None

    def counted(way: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            def call(*args: Any) -> Any:
                with FlopCounterMode(display=False) as counter, live or nullcontext():
                    results = graph(*args)
                flops[way] += counter.get_total_flops()
                return results

            return make_boxed_func(call)

        return compiler

    backend = aot_autograd(
        fw_compiler=counted("forward"),
        bw_compiler=counted("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    for layer in net.layers:
        layer.compile(backend=backend)

    def step() -> None:
        with live or nullcontext():
            x = net.embed_tokens(tokens)
            tables = net.rotary_emb(x, torch.arange(tokens.shape[1])[None])
        for layer in net.layers:
            x = layer(x, position_embeddings=tables, attention_mask=None)
        with live or nullcontext():
            grad = torch.ones_like(x)
        x.backward(grad)

    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    with functorch_config.patch(activation_memory_budget=budget):
        step()  # compiles
        flops.update(forward=0, backward=0)
        live = LiveBytes([*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), tokens])
        step()
    return flops["backward"], live.peak


def _count_attention() -> None:
    """Tell torch's counter, and so its planner, what causal attention on a CPU costs: it knows that of CUDA alone."""

    def forward(q: Any, *_: Any, **__: Any) -> int:
        batch, heads, tokens, size = q
        return int(2 * batch * heads * tokens * tokens * size)

    def backward(_: Any, q: Any, *args: Any, **kwargs: Any) -> int:
        return 5 * forward(q) // 2

    for operator, formula in ((_ATTENTION, forward), (_ATTENTION_BACKWARD, backward)):
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
