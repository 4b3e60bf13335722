"""Bytes of gradients on a rank of two: where they wait whole for the last micro-batch, and where shards are all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from headrace.helpers.live_bytes import LiveBytes
from headrace.helpers.tiny_models import LLAMA
from headrace.helpers.training import run_distributed
from headrace.kernels.api import Packing
from headrace.platform.planning.hardware import DeviceClass, HardwareProfile
from headrace.platform.planning.priced import wanted_bytes
from headrace.platform.planning.request import PlanRequest
from headrace.storage.core.records import Medium
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import Cuts
from headrace.workers.memory.policy import skeletons_of
from headrace.workers.memory.presets import Choices, preset_plan
from headrace.workers.memory.sweeps import open_sweep
from headrace.workers.model.decoder import Decoder
from headrace.workers.parallel.apply import parallelize
from headrace.workers.parallel.config import ParallelConfig
from headrace.workers.parallel.dims import resolve_dims
from headrace.workers.parallel.meshes import Meshes
from headrace.workers.parallel.process_group import process_group
from headrace.workers.train.config import Precision

CPU, SEQ_LEN = torch.device("cpu"), 16
WIDE = replace(LLAMA, vocab_size=32, hidden_size=128, num_layers=8, intermediate_size=512)


def peaks(context: RankContext, cases: list[tuple[str, int]], precision: Precision) -> list[int]:
    """Most bytes of all tensors in a step, of which those of the weights' gradients are nearly all that differs."""
    torch.set_num_threads(1)
    found = []
    with process_group(context, CPU):
        for preset, micro_batches in cases:
            model = Decoder(WIDE)
            choices = Choices(chunk_size=8)
            plan = preset_plan(preset, skeletons_of(model.blocks), cuts=Cuts(SEQ_LEN), choices=choices)
            mesh = Meshes.build(resolve_dims(ParallelConfig(), context.world_size), "cpu").params
            handle = parallelize(model, mesh=mesh, precision=precision, plan=plan)
            sweep = open_sweep(model, handle, None, loss_tile=SEQ_LEN, itemsize=4)
            tokens = torch.randint(0, WIDE.vocab_size, (1, SEQ_LEN))
            batch = TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([SEQ_LEN]))
            for step in range(2):
                for param in model.parameters():
                    param.grad = None
                with LiveBytes() as live:
                    for number in range(micro_batches):
                        is_last = number == micro_batches - 1
                        sweep.forward_backward(batch, 1.0, step=step, micro_batch=number, is_last=is_last)
            found.append(live.peak)
            sweep.close()
    return found


def planned(preset: str, micro_batches: int, num_shards: int, itemsize: int) -> int:
    """Of a GPU, where weights, gradients and optimizer state count."""
    request = PlanRequest(
        model=WIDE,
        seq_len=SEQ_LEN,
        profile=HardwareProfile(name="gpu", device_class=DeviceClass.cuda),
        preset=MemoryPreset(preset),
        micro_batches=micro_batches,
        num_shards=num_shards,
        itemsize=itemsize,
        chunk_size=8 if preset == "chunk" else None,
    )
    choices = Choices(chunk_size=8)
    plan = preset_plan(preset, request.skeletons(), cuts=Cuts(SEQ_LEN), choices=choices)
    return wanted_bytes(plan, request)[Medium.hbm]


@pytest.mark.parametrize(("num_ranks", "precision"), [(1, Precision.bf16), (2, Precision.fp32)])
def test_gradients_wait_whole_as_planned(num_ranks: int, precision: Precision) -> None:
    """The plan counts what more micro-batches, and chunks, hold of gradients; to the bytes of a block."""
    cases = [("recompute", 1), ("recompute", 2), ("recompute", 3), ("chunk", 1), ("chunk", 2), ("chunk", 3)]
    measured = dict(
        zip(cases, run_distributed(partial(peaks, cases=cases, precision=precision), num_ranks)[0], strict=True)
    )
    itemsize = 2 if precision is Precision.bf16 else 4
    plans = {case: planned(*case, num_ranks, itemsize) for case in cases}
    num_params = sum(param.numel() for param in Decoder(WIDE).blocks.parameters())
    block = 4 * num_params // WIDE.num_layers
    for preset in ("recompute", "chunk"):
        for number in (2, 3):
            more = measured[preset, number] - measured[preset, 1]
            assert abs(plans[preset, number] - plans[preset, 1] - more) <= block, (preset, number)
    # Of one micro-batch by chunk, shards take the place of the sums: only weights and moments are fewer on more ranks.
    spared = planned("chunk", 1, 1, itemsize) - plans["chunk", 1]
    assert abs(spared - 12 * (num_params - num_params // num_ranks)) <= block
    assert abs(measured["chunk", 1] - 4 * num_params) <= 2 * block
