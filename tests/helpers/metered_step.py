"""What a step holds on the device: by the tensors that live, and by the meter."""

from __future__ import annotations

import torch

from headrace.helpers.live_bytes import LiveBytes
from headrace.kernels.api import Packing
from headrace.storage.stack import TierStack
from headrace.workers.data.batch import TokenBatch
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import MemoryPlan
from headrace.workers.memory.sweeps import apply_plan, open_sweep
from headrace.workers.model.decoder import Decoder


def live_and_metered(
    model: Decoder, plan: MemoryPlan, num_tokens: int, stack: TierStack, *, loss_tile: int
) -> tuple[int, int]:
    """Peaks of a step over one row, gradients of parameters apart. The meter ends at zero."""
    meter = DeviceMeter()
    model.init_weights(0)
    grads = []
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
        grads.append(param.grad)
    handle = apply_plan(model, plan, stack, meter=meter, bucket_plans=None)
    sweep = open_sweep(model, handle, meter, loss_tile=loss_tile, itemsize=4)
    tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens))
    batch = TokenBatch(tokens, tokens.roll(-1, 1), Packing.of_lengths([num_tokens]))
    apart = [*model.parameters(), *grads, tokens, batch.targets]
    with LiveBytes(apart) as live:
        sweep.forward_backward(batch, 1.0, step=0, micro_batch=0)
    sweep.close()
    assert meter.resident_bytes == 0
    return live.peak, meter.peak_bytes
