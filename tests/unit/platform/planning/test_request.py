from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.platform.config.load import load_run_config
from headrace.platform.planning.from_config import request_from_config
from headrace.platform.planning.presets import asked_plan
from headrace.platform.planning.request import GIB, PlanRequest
from headrace.storage.core.errors import InputError
from headrace.storage.core.records import Medium
from headrace.workers.memory.config import MemoryPreset
from headrace.workers.memory.plan import keep_layer


def request(*words: str, vocab_size: int = 77) -> PlanRequest:
    return request_from_config(load_run_config(("model=tiny", *words), environ={}).config, vocab_size)


def test_every_key_reaches_the_planner() -> None:
    found = request(
        "data.seq_len=512",
        "train.precision=bf16",
        "train.batch_size=3",
        "train.micro_batches=2",
        "train.loss_tile=64",
        "memory=offload_ssd",
        "memory.prefetch_layers=2",
        "tiers.device.budget_gib=0.5",
        "tiers.host.budget_gib=0",
        "tiers.ssd.budget_gib=4",
        "cluster.num_workers=4",
        "parallel.fsdp=2",
    )
    assert (found.seq_len, found.itemsize, found.batch_size, found.micro_batches) == (512, 2, 3, 2)
    assert (found.loss_tile, found.prefetch_layers, found.preset) == (64, 2, MemoryPreset.offload_ssd)
    assert (found.ranks_per_node, found.num_shards) == (4, 2)
    # The device's budget is per rank, the others are per node.
    assert found.budgets().tiers == {Medium.hbm: GIB // 2, Medium.host: 0, Medium.ssd: GIB}
    assert found.model.vocab_size == 77
    assert request("model.vocab_size=50").model.vocab_size == 50


def test_degrees() -> None:
    words = ("cluster.num_nodes=2", "cluster.gpus_per_node=4", "model.num_heads=4")
    found = request(*words, "parallel.ring=2", "parallel.tensor=2")
    assert (found.num_shards, found.tensor_degree, found.sequence_degree, found.ulysses) == (4, 2, 2, 1)
    whole, cut = request(*words).cost(), found.cost()
    for preset in (MemoryPreset.keep, MemoryPreset.offload_host, MemoryPreset.ssdtrain):
        plan = asked_plan(replace(found, preset=preset))
        blocks = zip(found.blocks(plan), request(*words).blocks(plan), strict=True)
        assert all(4 * ours.held == its.held and 4 * ours.away == its.away for ours, its in blocks)
    assert cut.block_flops == pytest.approx(whole.block_flops / 4)
    with pytest.raises(InputError, match=r"parallel\.pipeline=2"):
        request(*words, "parallel.pipeline=2")


def test_ulysses_keeps_what_the_output_projection_reads_beside_what_attention_made() -> None:
    words = ("cluster.num_workers=4", "model.num_heads=4")
    whole, two, four = (request(*words, f"parallel.ulysses={degree}") for degree in (1, 2, 4))
    assert (four.sequence_degree, four.ulysses, four.ring) == (4, 4, 1)
    keeps, kept = (each.shape().cost(keep_layer(each.skeleton())).held for each in (whole, two))
    shape = two.shape()
    assert kept == keeps // 2 + shape.batch_size * shape.rows * two.model.hidden_size * two.itemsize
    # Two KV heads for four ranks: each goes to two of them.
    widths = [each.skeleton().tensors["k"].width // each.model.head_size for each in (whole, two, four)]
    assert widths == [2, 2, 4]
