"""Joining and leaving the group; devices; what is said when it does not work."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist

from headrace.storage.core.errors import InputError, MachineError
from headrace.storage.core.ports import free_port
from headrace.workers.job import RankContext
from headrace.workers.parallel import process_group as module
from headrace.workers.parallel.process_group import pick_device, process_group

CPU = torch.device("cpu")


def test_one_rank_needs_no_port_and_can_come_again() -> None:
    for _ in range(2):
        with process_group(RankContext(), CPU):
            value = torch.tensor([3])
            dist.all_reduce(value)
            assert value.item() == 3
            assert dist.get_backend() == "gloo"
        assert not dist.is_initialized()


def test_the_group_is_left_when_the_block_fails() -> None:
    with pytest.raises(KeyError), process_group(RankContext(), CPU):
        raise KeyError("boom")
    assert not dist.is_initialized()


def test_two_ranks_without_a_port_are_told() -> None:
    with pytest.raises(InputError, match="master_port"), process_group(RankContext(world_size=2), CPU):
        pass
    with pytest.raises(InputError, match="rank 2"), process_group(RankContext(rank=2, world_size=2), CPU):
        pass


def test_a_taken_port_is_a_machine_error_that_names_it() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        context = RankContext(world_size=2, master_port=port)
        with pytest.raises(MachineError, match=f"127.0.0.1:{port}"), process_group(context, CPU):
            pass


def test_nobody_there_is_a_machine_error_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENDEZVOUS_TIMEOUT_S", 0.5)
    context = RankContext(rank=1, world_size=2, master_port=free_port())
    with pytest.raises(MachineError, match="rank 1 of 2"), process_group(context, CPU):
        pass


def test_a_rank_takes_the_one_gpu_it_sees_or_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device(RankContext(device="cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(RankContext(device="cuda", local_rank=3)) == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(RankContext(device="cuda", local_rank=3)) == torch.device("cuda", 3)
    with pytest.raises(MachineError, match="device 4"):
        pick_device(RankContext(device="cuda", local_rank=4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match=r"train\.device=cpu"):
        pick_device(RankContext(device="cuda"))
    with pytest.raises(InputError, match="tpu"):
        pick_device(RankContext(device="tpu"))
