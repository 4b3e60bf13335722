"""Planned addresses on CUDA: the bits of torch's allocator, all requests served, and no allocation of a step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from headrace.helpers.training import run_recorded, tiny_data, tiny_job
from headrace.workers.job import RankContext
from headrace.workers.train.config import Allocator, Precision
from headrace.workers.train.step_addresses import StepAddresses, open_addresses

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("memory", ["keep", "recompute", "chunk"])
def test_a_run_with_planned_addresses_has_the_bits_of_one_without(memory: str, tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "rows", seq_len=512, num_documents=600)
    curves, facts = [], {}
    for allocator in Allocator:
        train = {"steps": 8, "batch_size": 1, "precision": Precision.bf16, "loss_tile": 256, "allocator": allocator}
        model = {"hidden_size": 256, "intermediate_size": 512}
        chunk = {"chunk_size": 128} if memory == "chunk" else {}
        job = tiny_job(tmp_path, run=allocator.value, data=data, train=train, model=model, memory=memory, **chunk)
        found = run_recorded(job, RankContext(device="cuda"))
        curves.append(found.curve)
        facts = found.result.stats
    assert curves[0] == curves[1]
    assert not [event for event in facts["events"] if event["kind"].startswith("addresses")]
    served, planned, arena, live = (int(word) for word in re.findall(r"\d+", facts["addresses"]))
    assert served > 0.8 * planned, "some requests outlive a step"
    assert live <= arena <= 1.02 * live


def work(addresses: StepAddresses, side: torch.cuda.Stream) -> torch.Tensor:
    """A step with temporaries, and with a tensor that another stream reads after it is freed."""
    with addresses.step():
        x = torch.full((1 << 20,), 2.0, device="cuda")
        y = (x * 3 + 1).sqrt() * x
        out = torch.empty(1 << 20, pin_memory=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)
            out.copy_(y, non_blocking=True)
        y.record_stream(side)
        del y
        z = torch.zeros(1 << 20, device="cuda")  # would take the place of y
        z += 1
        del x, z
    torch.cuda.synchronize()
    return out


def test_memory_that_another_stream_reads_is_not_given_out() -> None:
    addresses, side = open_addresses(torch.device("cuda")), torch.cuda.Stream()
    results = [work(addresses, side) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert float(results[0][0]) == pytest.approx(2 * 7**0.5)


def test_later_steps_ask_torchs_allocator_for_the_arena_alone() -> None:
    addresses, counts = open_addresses(torch.device("cuda")), []
    for _ in range(5):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with addresses.step():
            x = torch.ones(3 << 20, device="cuda")
            for _ in range(10):
                x = x * 1.5
            del x
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert counts == [11, 11, 1, 1, 1]
