"""Gradients of weights in a pass of their own: on one process, against a plain backward."""

from __future__ import annotations

import pytest
import torch

from headrace.helpers.tiny_models import MODELS
from headrace.kernels.api import Packing
from headrace.workers.memory.footprint import footprint
from headrace.workers.memory.meter import DeviceMeter
from headrace.workers.memory.plan import Cuts, LayerPlan, MemoryPlan, Residence, keep_layer
from headrace.workers.memory.policy import apply_memory
from headrace.workers.memory.schedule import schedule_of
from headrace.workers.memory.weight_queue import WeightQueue
from headrace.workers.model.config import NO_ADAPTER, AdapterConfig, AdapterKind
from headrace.workers.model.decoder import Decoder

SEQ_LEN = 12
LORA = AdapterConfig(kind=AdapterKind.lora, rank=2, targets="q_proj,down_proj")
# Layer plan and cuts; with one tile the gradient of a residual is written to after its product is queued.
PLANS = {"keep": Cuts(), "recompute": Cuts(token_tile=5), "head groups": Cuts(head_groups=2)}


def decoder(name: str, adapter: AdapterConfig = NO_ADAPTER) -> Decoder:
    model = Decoder(MODELS[name], dtype=torch.float64, adapter=adapter)
    torch.manual_seed(0)
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def forward(model: Decoder) -> torch.Tensor:
    tokens = torch.randint(0, 50, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    packing = Packing.of_lengths([SEQ_LEN, 5, SEQ_LEN - 5])
    return model(tokens, tokens.roll(-1, 1), packing=packing, loss_tile=16)


@pytest.mark.parametrize(("name", "adapter"), [("qwen3", NO_ADAPTER), ("qwen2", NO_ADAPTER), ("llama", LORA)])
@pytest.mark.parametrize("plan", PLANS)
def test_split_gradients_are_those_of_one_backward(name: str, adapter: AdapterConfig, plan: str) -> None:
    """Two micro-batches alike, the second in I and W; what waits takes the bytes that the footprint says."""
    plain, model = decoder(name, adapter), decoder(name, adapter)
    (2 * forward(plain)).backward()
    (program,) = {block.program for block in model.blocks[:1]}
    skeleton = program.grouped(PLANS[plan].head_groups).skeleton
    layer = LayerPlan.of(x=Residence.hbm) if plan == "recompute" else keep_layer(skeleton)
    meter = DeviceMeter(parameters=model.parameters())
    whole = MemoryPlan(plan, (layer,) * len(model.blocks), cuts=PLANS[plan])
    handle, queue = apply_memory(list(model.blocks), whole, meter=meter, norm=model.norm), WeightQueue(meter)
    handle.split_backward(queue)
    with meter:
        handle.begin(0, 0, stage=0)
        forward(model).backward()
        handle.begin(0, 1, stage=0)
        loss = forward(model)
        with queue.input_gradient(0, 1):
            loss.backward()
        sizes = {"batch_size": 2, "num_tokens": SEQ_LEN, "itemsize": 8, "casts_products": True, "splits": True}
        found = footprint(schedule_of(skeleton), layer, PLANS[plan], **sizes)
        sums = 8 * len(model.blocks) * sum(segment.trained for segment in skeleton.segments)
        assert meter.resident_bytes == len(model.blocks) * found.queued + sums
        with pytest.raises(RuntimeError, match=r"gradients of weights were not computed.*\[\(0, 1\)\]"):
            queue.end()
        queue.run(0, 1)
        assert meter.resident_bytes == sums
        with pytest.raises(KeyError):
            queue.run(0, 1)
    queue.end()
    assert meter.resident_bytes == 0
    handle.end()
    expected, grads = gradients(plain), gradients(model)
    assert grads.keys() == expected.keys()
    for key, grad in expected.items():
        assert float((grads[key] - grad).norm()) <= 1e-13 * float(grad.norm()), key
