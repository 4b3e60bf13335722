"""What the simulator sends is what the planner prices and a run counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.platform.config.load import load_run_config
from headrace.platform.planning.communication import sent_bytes
from headrace.platform.planning.from_config import request_from_config
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.simulate.network import traffic
from headrace.platform.planning.simulate.step import dims_of
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.telemetry import names


@pytest.mark.parametrize(
    ("tensor", "ulysses", "ring"), [(1, 2, 1), (1, 4, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (2, 1, 1), (2, 2, 2)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_that_keeps_all_sends_what_the_simulator_sends(
    tensor: int, ulysses: int, ring: int, precision: str
) -> None:
    """Two KV heads, so four Ulysses ranks, or two beside two tensor ranks, get each head twice."""
    words = ("model=tiny", f"parallel.ulysses={ulysses}", f"parallel.ring={ring}", f"train.precision={precision}")
    words = (*words, f"parallel.tensor={tensor}", f"cluster.num_workers={tensor * ulysses * ring}")
    config = load_run_config(words, environ={}).config
    request = replace(request_from_config(config, 77), preset=MemoryPreset.keep)
    found = sent_bytes(asked_plan(request), request)
    tokens = request.batch_size * request.seq_len
    block = traffic(request.model, dims_of(config), batch_tokens=tokens, itemsize=request.itemsize)
    passes = request.model.num_layers * request.micro_batches
    assert found.get(names.ULYSSES_SENT_GIB, 0) == 2 * passes * block.ulysses
    # Of four gathers and scatters in forward, backward makes the gathers again. The rest is not of the blocks.
    rest = found.get(names.TENSOR_SENT_GIB, 0) - 2.5 * passes * block.tensor
    assert (rest > 0) == (tensor > 1)
    assert rest <= 2 * passes * block.tensor
    assert found.get(names.RING_SENT_GIB, 0) == passes * (block.ring + block.ring_backward)
