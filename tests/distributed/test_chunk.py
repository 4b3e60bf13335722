"""The sweep by chunk on two ranks: one reduction per block and step, gradients of one plain process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp_group

from headrace.helpers.tiny_models import QWEN3
from headrace.helpers.training import run_distributed
from headrace.kernels.api import Packing
from headrace.workers.data.batch import TokenBatch
from headrace.workers.job import RankContext
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

CPU, SEQ_LEN = torch.device("cpu"), 19
MODEL = replace(QWEN3, vocab_size=31)


def decoder() -> Decoder:
    model = Decoder(MODEL)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.4)
    return model


def batch(rank: int, micro_batch: int) -> TokenBatch:
    tokens = torch.randint(0, 31, (1, SEQ_LEN), generator=torch.Generator().manual_seed(10 * rank + micro_batch))
    return TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([SEQ_LEN]))


def chunked_gradients(
    context: RankContext, precision: Precision, num_gathered: int, micro_batches: int
) -> dict[str, Any]:
    """Losses and gathered gradients of a step, reductions per step, and the loss of an evaluation after an update."""
    torch.set_num_threads(1)
    with process_group(context, CPU):
        model = decoder()
        plan = preset_plan("chunk", skeletons_of(model.blocks), cuts=Cuts(4), choices=Choices(chunk_size=6))
        plan = type(plan)(**{**vars(plan), "gathered_layers": num_gathered})
        mesh = Meshes.build(resolve_dims(ParallelConfig(), context.world_size), "cpu").params
        handle = parallelize(model, mesh=mesh, precision=precision, plan=plan)
        sweep = open_sweep(model, handle, None, loss_tile=8, itemsize=4)
        reductions, reduce = [], fsdp_group.foreach_reduce
        fsdp_group.foreach_reduce = lambda *args, **kwds: (reductions.append(1), reduce(*args, **kwds))[1]
        losses = []
        for number in range(micro_batches):
            is_last = number == micro_batches - 1
            own = batch(context.rank, number)
            losses.append(sweep.forward_backward(own, 1.0, step=0, micro_batch=number, is_last=is_last))
        fsdp_group.foreach_reduce = reduce
        grads = {name: param.grad.full_tensor() for name, param in model.named_parameters()}
        before = sweep.evaluate(batch(0, 0))
        model.reshard()
        with torch.no_grad():
            for param in model.parameters():
                param.sub_(0.01 * param.grad)
        after = sweep.evaluate(batch(0, 0))
        sweep.close()
        return {"losses": losses, "grads": grads, "reductions": len(reductions), "evaluated": (before, after)}


@pytest.mark.parametrize(
    ("precision", "num_gathered", "micro_batches", "bound"),
    [
        (Precision.fp32, 3, 2, 1e-5),
        (Precision.fp32, 1, 1, 1e-5),
        (Precision.bf16, 3, 1, 4e-2),
        (Precision.bf16, 0, 2, 4e-2),
    ],
)
def test_one_reduction_and_the_gradients_of_one_process(
    precision: Precision, num_gathered: int, micro_batches: int, bound: float
) -> None:
    model, expected_losses = decoder().double(), []
    for rank in range(2):
        for number in range(micro_batches):
            own = batch(rank, number)
            loss = model(own.tokens, own.targets)
            loss.backward()
            expected_losses.append(float(loss.detach()))
    ranks = run_distributed(
        partial(chunked_gradients, precision=precision, num_gathered=num_gathered, micro_batches=micro_batches), 2
    )
    found_losses = [float(loss) for found in ranks for loss in found["losses"]]
    assert found_losses == pytest.approx(expected_losses, rel=bound)
    for found in ranks:
        assert found["reductions"] == MODEL.num_layers + 1  # every block and the root, once
        whole = torch.cat([grad.double().flatten() for grad in found["grads"].values()])
        wanted = torch.cat([param.grad.flatten() for param in model.parameters()])
        assert float((whole - wanted).norm() / wanted.norm()) < bound
        before, after = found["evaluated"]
        assert float(before) == pytest.approx(found_losses[0], rel=bound)
        assert float(after) < float(before)  # of the new weights
